import torch

from megatron_hammer.checkpoint.surgery.new_rows import build_new_rows, mean_of_all


def test_a_piece_without_a_spelling_gets_the_mean_of_all_rows():
    rows = torch.randn(7, 3)
    means = build_new_rows(rows, [[1, 2, 2], [], [4]])
    assert torch.equal(means[1], rows.double().mean(dim=0).float())
    assert torch.equal(means[2], rows[4])
    torch.testing.assert_close(means[0], (rows[1] + 2 * rows[2]) / 3)


def test_the_mean_is_computed_in_fp32():
    rows = torch.full((300, 2), 1.0, dtype=torch.bfloat16)
    rows[0] = 257.0  # a sum in bf16 would lose every 1 after it
    expected = torch.tensor((256.0 + 299.0) / 300.0).bfloat16()  # 257 is stored as 256
    assert torch.equal(build_new_rows(rows, [list(range(300))]), expected.expand(1, 2))


def test_the_mean_of_many_rows_is_summed_in_blocks():
    rows = torch.randn(9001, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mean_of_all(rows), rows.double().mean(dim=0).float())
    assert mean_of_all(rows.bfloat16()).dtype == torch.bfloat16
