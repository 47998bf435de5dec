"""Flags that make no sense beside --sft, and what they would do to conversations."""

from megatron_hammer.config.flag_tables.row import Refusal
from megatron_hammer.config.flags import Flags


def _is_packed(flags: Flags) -> bool:
    return bool(flags["sft"]) and not flags["sft_unpacked"]


SFT_REFUSALS: tuple[Refusal, ...] = (
    *(
        Refusal(
            name,
            lambda flags, name=name: bool(flags["sft"]) and bool(flags[name]),  # type: ignore[misc]
            why,
            "Drop it, or drop --sft",
        )
        for name, why in (
            ("mock_data", "makes random text, where --sft trains on conversations"),
            ("reset_position_ids", "acts on documents of text; positions begin anew with each conversation already"),
            ("reset_attention_mask", "acts on documents of text; conversations do not attend to each other already"),
            ("eod_mask_loss", "masks the ends of documents of text; the masks of conversations say what is learned"),
            ("create_attention_mask_in_dataloader", "makes one mask for all samples, without boundaries"),
            ("data_order_samples", "is for the order of text; that of conversations is the same at every length"),
            ("dataloader_fast_cache_load", "reads the sample index of text, which conversations have none of"),
            ("iterations_to_skip", "reads batches in a way of Megatron's own, without boundaries"),
        )
    ),
    Refusal(
        "data_order",
        lambda flags: bool(flags["sft"]) and flags["data_order"] != "megatron",
        "is for text; conversations are shuffled epoch by epoch already",
        "Drop it",
    ),
    Refusal(
        "dataloader_type",
        lambda flags: bool(flags["sft"]) and flags["dataloader_type"] == "cyclic",
        "would shuffle the shuffled conversations again",
        "Drop it",
    ),
    Refusal(
        "sft_epochs",
        lambda flags: (
            bool(flags["sft"])
            and flags["sft_epochs"] is not None
            and bool({"train_iters", "train_samples"} & flags.typed)
        ),
        "gives the length of the run, as --train-iters and --train-samples do",
        "Pass one of them",
    ),
    Refusal(
        "cuda_graph_impl",
        lambda flags: _is_packed(flags) and flags["cuda_graph_impl"] not in (None, "none"),
        "records one number of conversations, and packed sequences differ in theirs",
        "Drop it, or pass --sft-unpacked",
    ),
)
