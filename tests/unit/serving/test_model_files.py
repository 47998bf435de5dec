"""The cache of converted models: found again where nothing has changed, and made anew where anything has."""

import json
from pathlib import Path

import pytest

from megatron_hammer.checkpoint.gguf import to_gguf
from megatron_hammer.checkpoint.gguf.header import read_gguf_header
from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import write_hashes
from megatron_hammer.errors import ConfigError
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from megatron_hammer.serving.model_files import ModelSource, open_gguf, open_hugging_face
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.chat_tokenizers import train_with_symbols
from tests.helpers.gguf_models import make_toy_model, write_gguf_source
from tests.helpers.messages import raises_problem
from tests.helpers.served_models import write_chat_folder
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was converted, in order."""
    done: list[Path] = []
    export = to_gguf.export_to_gguf

    def count(options, on_step):
        done.append(options.save_path)
        return export(options, on_step)

    monkeypatch.setattr(to_gguf, "export_to_gguf", count)
    return done


def convert(cache_dir: Path | None, path: Path, **options) -> Path:
    source = ModelSource(path=path, is_verified=False, **options)
    with open_gguf(source, cache_dir, lambda stage, done, total: None) as gguf:
        assert read_gguf_header(gguf)["general.name"] == path.name
        return gguf


def test_a_second_start_finds_what_the_first_one_made(tmp_path: Path, conversions: list[Path]) -> None:
    folder, cache_dir = write_gguf_source(tmp_path / "toy"), tmp_path / "cache"
    first = convert(cache_dir, folder)
    (folder / "README.md").write_text("is not part of the model")
    for path in folder.iterdir():
        path.touch()
    assert convert(cache_dir, folder) == first
    assert (len(conversions), list(cache_dir.iterdir())) == (1, [first])


def test_every_change_of_the_model_makes_another_file(tmp_path: Path, conversions: list[Path]) -> None:
    folder, cache_dir = write_chat_folder(tmp_path / "toy"), tmp_path / "cache"
    made = {convert(cache_dir, folder), convert(cache_dir, folder, file_type="f32")}
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # same size
    weights.write_bytes(content)
    made.add(convert(cache_dir, folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    path = convert(cache_dir, folder)
    assert read_gguf_header(path)["tokenizer.chat_template"] == "{{ messages }}"
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    made |= {path, convert(cache_dir, folder)}
    assert len(made) == len(conversions) == 5


def test_without_a_cache_nothing_stays(tmp_path: Path, conversions: list[Path]) -> None:
    folder = write_gguf_source(tmp_path / "toy")
    assert not convert(None, folder).parent.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def write_run(folder: Path, seed: int, **arguments: str) -> Path:
    tensors = {
        key: tensor.new_ones(384, 24) if tensor.shape == (64, 24) else tensor
        for key, tensor in toy_llama_tensors(seed=seed).items()
    }
    sizes = {"vocab_size": 370, "padded_vocab_size": 384, "max_position_embeddings": 64}
    write_toy_checkpoint(folder, tensors, arguments=toy_arguments(**sizes, **arguments))
    return folder


def test_a_checkpoint_is_known_by_its_hashes_and_its_tokenizer(tmp_path: Path, conversions: list[Path]) -> None:
    tokenizer = tmp_path / "toy.model"
    tokenizer.write_bytes(make_toy_model().read_bytes())
    run, cache_dir = write_run(tmp_path / "run", 1, tokenizer_model=str(tokenizer)), tmp_path / "cache"
    first = convert(cache_dir, run)
    assert convert(cache_dir, run) == first
    (directory,) = run.glob("iter_*")
    write_hashes(directory)
    hashed = convert(cache_dir, run)
    assert convert(cache_dir, run) == hashed
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert len({first, hashed, convert(cache_dir, run)}) == len(conversions) == 3


def test_flags_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with raises_problem(ConfigError, f"{tmp_path / 'm.gguf'}:", "--type, --iteration", "GGUF file"):
        convert(None, tmp_path / "m.gguf", file_type="f32", iteration=3)
    folder = write_gguf_source(tmp_path / "toy")
    with raises_problem(ConfigError, f"{folder}:", "--iteration", "Hugging Face folder"):
        convert(None, folder, iteration=3)
    source = ModelSource(path=folder, file_type="f32")
    with (
        raises_problem(ConfigError, f"{folder}:", "--type", "vllm"),
        open_hugging_face(source, None, lambda *step: None),
    ):
        pass


def test_a_checkpoint_for_vllm_is_exported_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, tokenizer_model=str(make_toy_model()))
    source = ModelSource(path=run, is_verified=False)
    with open_hugging_face(source, tmp_path / "cache", lambda *step: None) as first:
        made_at_ns = (first / "config.json").stat().st_mtime_ns
    with open_hugging_face(source, tmp_path / "cache", lambda *step: None) as second:
        assert (second, (second / "config.json").stat().st_mtime_ns) == (first, made_at_ns)


def test_the_template_of_a_checkpoint_reaches_the_file_and_its_name(tmp_path: Path) -> None:
    tokenizer = train_with_symbols(tmp_path / "symbols.model")
    run, cache_dir = write_run(tmp_path / "run", 1, tokenizer_model=str(tokenizer)), tmp_path / "cache"
    base, chatml, other = (convert(cache_dir, run, chat_template=name) for name in (None, "chatml", "tiny_llm_zh"))
    assert len({base, chatml, other}) == 3
    assert "tokenizer.chat_template" not in read_gguf_header(base)
    header = read_gguf_header(chatml)
    assert header["tokenizer.chat_template"] == load_chat_template("chatml").text
    end = load_encoder(tokenizer).encode("<|im_end|>").tolist()[-1]
    assert end in (header["tokenizer.ggml.eos_token_id"], header.get("tokenizer.ggml.eot_token_id"))
