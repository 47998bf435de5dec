"""README.md of an exported model: what it is, how it was trained, how to load it. Nothing that is not in its inputs."""

from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.model.shape import ModelShape

MODEL_CARD_NAME = "README.md"


def build_model_card(
    family: Family,
    model: ModelShape,
    *,
    args: Any,
    iteration: int,
    dtype: str,
    num_parameters: int,
    has_tokenizer: bool,
) -> str:
    """Markdown with a table of the architecture and one of the recipe in Megatron's saved arguments.

    A checkpoint that was converted from elsewhere and not trained since has no recipe; the card says so.
    """
    name = getattr(args, "preset", None) or f"{family.hf_class} with {num_parameters:,} parameters"
    origin = getattr(args, "imported_from", None)
    # iteration: a model that was imported and then trained further has a recipe of its own.
    if origin is not None and not iteration:
        history = f"Converted by megatron_hammer from {Path(origin).name}, not trained further."
        training = "See the model that it was converted from.\n"
    else:
        history = (
            f"Pretrained with megatron_hammer and exported at iteration {iteration:,}. A base model: it continues text."
        )
        training = _table(_recipe(args, iteration))
    tokenizer_line = "" if has_tokenizer else "\nThis folder has no tokenizer; add the one that made its data.\n"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"{history}\n{tokenizer_line}\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        "```\n\n"
        f"## Architecture\n\n{_table(_architecture(family, model, dtype, num_parameters))}\n"
        f"## Training\n\n{training}"
    )


def _architecture(family: Family, model: ModelShape, dtype: str, num_parameters: int) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "class": family.hf_class,
        "parameters": f"{num_parameters:,}",
        "dtype": dtype,
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "attention heads / query groups": f"{model.num_attention_heads} / {model.num_query_groups}",
        "MLP size": model.ffn_hidden_size,
        "vocabulary": f"{model.vocab_size:,}",
        "positions": f"{model.max_position_embeddings:,} ({model.position_embedding_type})",
        "tied embeddings": "yes" if model.has_tied_embeddings else "no",
    }
    if model.moe is not None:
        rows |= {
            "experts": f"{model.moe.num_experts}, {model.moe.router_topk} a token, size {model.moe.ffn_hidden_size}",
            "shared expert": f"size {model.moe.shared_expert_intermediate_size}",
        }
    return rows


def _recipe(args: Any, iteration: int) -> dict[str, Any]:
    """Rows for what the saved arguments say; a converted checkpoint has never been trained and says less."""
    # Checkpoints of other versions lack some arguments; their rows are left out.
    values = vars(args)

    def has(*names: str) -> bool:
        return all(values.get(name) is not None for name in names)

    samples = values.get("consumed_train_samples") or 0
    rows: dict[str, Any] = {"steps": f"{iteration:,}"}
    if has("seq_length"):
        rows |= {"tokens": f"{samples * args.seq_length:,}", "sequence length": f"{args.seq_length:,}"}
    if has("global_batch_size"):
        rows["global batch"] = f"{args.global_batch_size:,} sequences"
    if has("lr", "min_lr", "lr_decay_style"):
        rows["learning rate"] = f"{args.lr} to {args.min_lr}, {args.lr_decay_style}"
    if has("weight_decay"):
        rows["weight decay"] = args.weight_decay
    if has("adam_beta1", "adam_beta2", "adam_eps"):
        rows["Adam"] = f"beta1 {args.adam_beta1}, beta2 {args.adam_beta2}, epsilon {args.adam_eps}"
    if has("clip_grad"):
        rows["gradient clipping"] = args.clip_grad
    if has("hidden_dropout", "attention_dropout"):
        rows["dropout"] = f"hidden {args.hidden_dropout}, attention {args.attention_dropout}"
    if has("seed"):
        rows["seed"] = args.seed
    return rows


def _table(rows: dict[str, Any]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{lines}"
