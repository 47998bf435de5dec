"""The inputs of compare_revisions.py: text, Hugging Face folders and tables, made from fixed seeds.

Nothing of the package is used, so two recordings start from the same bytes whatever was changed in it.
"""

import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEED = 20
VOCAB_SIZE = 1201  # of the tokenizer that the commands train, and of every model
NUM_WORDS = 4000
CHINESE = (
    "春眠不觉晓处闻啼鸟夜来风雨声花落知多少的一是在人有我他这中大国上个到说们为子和你地出道也时年得就那要"
    "下以生会自着去之过家学对可她里后小么心天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前"
    "所本见经头面公同三已老从动两长"
)
HOSTILE = (
    *("", " ", "\n\n", "\u3000 全角 \t", "e\u0301te\u0301 caf\u00e9", "\U0001f600\U0001f469\u200d\U0001f4bb ok"),
    *(
        "\u05e9\u05dc\u05d5\u05dd \u202eabc",
        "a\r\nb\rc",
        "\x01\x7f\ufeff",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ),
    *("3.14159 -1e-7 0x1F 10,000", "<s></s><unk>", "a" * 700, "\u4dff\ua000 rare"),
)
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# transformers' grouped products want multiples of 16 bytes
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2_SIZES = {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32, "n_inner": 40}
GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}

# Folder: (class of transformers' configuration, its arguments beyond the sizes, options of save_pretrained).
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 10}, {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-rope3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, {}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": LINEAR_ROPE, "num_key_value_heads": 6}, {}),
    "llama-shards": ("LlamaConfig", {"num_hidden_layers": 5, "rms_norm_eps": 1e-5}, {"max_shard_size": "100KB"}),
    "mistral": ("MistralConfig", {"sliding_window": None}, {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3Config", {"head_dim": 14}, {}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5}, {}),
    "seed-oss": ("SeedOssConfig", {"head_dim": 14}, {}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4}, {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
        {},
    ),
    "helium": ("HeliumConfig", {"head_dim": 8}, {}),
    "gpt2": ("GPT2Config", {}, {}),
    "gpt2-gelu": ("GPT2Config", {"activation_function": "gelu", "tie_word_embeddings": False}, {}),
    "tinyllm": ("Qwen2Config", {"num_key_value_heads": 6}, {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}, {}),
    "qwen2-moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 36}, {}),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 14, "norm_topk_prob": True}, {}),
    "qwen3-moe-packed": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 14}, {"save_original_format": False}),
}

RUN_COLUMNS = (
    *("source", "model", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus", "gpu_type", "tp"),
    *("pp", "vpp", "cp", "dp", "micro_batch", "global_batch", "precision", "recompute", "iteration_time_s", "sharding"),
)
RUN_ROWS = (
    "team_a,GPT-a,24,2048,16,16,8192,51200,2048,16,H100,2,1,,1,8,2,64,bf16,none,0.71,distributed optimizer",
    "team_a,GPT-a,24,2048,16,16,8192,51200,2048,16,H100,1,2,,1,8,2,64,bf16,none,0.83,distributed optimizer",
    "team_b,Llama-b,32,4096,32,8,14336,128256,8192,64,H100,2,1,,1,32,1,128,bf16,none,2.9,distributed optimizer",
    "team_b,Llama-b,32,4096,32,8,14336,128256,8192,64,H100,1,4,2,1,16,1,128,bf16,full,3.7,distributed optimizer",
    "team_c,GPT-c,40,5120,40,40,20480,51200,2048,128,A100-80GB,4,2,,1,16,2,512,bf16,selective,7.1,none",
    "team_c,GPT-c,40,5120,40,40,20480,51200,2048,128,A100-80GB,8,1,,1,16,4,512,bf16,none,7.9,none",
    "team_c,GPT-?,40,,40,40,,51200,2048,128,A100-80GB,8,1,,1,16,4,512,bf16,none,,none",
)


def write_material(work_dir: Path) -> None:
    """Write text/, tour/data/, hf/, tables/ and nltk/ below the folder."""
    for name in ("text", "hf", "tables"):
        (work_dir / name).mkdir(parents=True)
    write_texts(work_dir / "text")
    write_models(work_dir / "hf")
    write_tables(work_dir / "tables")
    write_punkt_model(work_dir / "nltk" / "tokenizers" / "punkt_tab" / "english")


# --- text ------------------------------------------------------------------------------------------------------------


def write_texts(folder: Path) -> None:
    """Documents in every format that the data tools read, with broken, equal and almost equal ones."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    draw = TextDraw(random.Random(SEED))
    parts = [[draw.draw_record(number) for number in range(240)] for _ in range(6)]
    first, second, third, fourth, fifth, large = parts
    (folder / "a.jsonl").write_bytes(encode_lines(first + [{"text": text, "title": "hostile"} for text in HOSTILE]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(encode_lines(second), mtime=0))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(encode_lines(third)))
    (folder / "d.json").write_text(json.dumps(fourth[:50], ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "e.txt").write_text("\n\n".join(record["text"] for record in fifth[:30]), encoding="utf-8", newline="")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(fifth[30:90]), folder / "f.parquet")
    broken = [*encode_lines(large[:5]).splitlines(True), b'{"text": 3}\n', b'{"content": "x"}\n', b'{"text": "cut\n']
    (folder / "broken.jsonl").write_bytes(b"".join(broken))
    (folder / "twice.jsonl").write_bytes(encode_lines([*first[:60], *first[20:50], *map(change_slightly, first[:20])]))
    (folder / "large.jsonl").write_bytes(encode_lines([draw.draw_record(number) for number in range(1500)]))
    tour_data_dir = folder.parent / "tour" / "data"  # a corpus that is there is kept; the tour would look for text
    tour_data_dir.mkdir(parents=True)
    for name in ("corpus.jsonl", "valid.jsonl"):
        (tour_data_dir / name).write_bytes((folder / "large.jsonl").read_bytes())
    (folder / "characters.txt").write_text("".join(CHINESE[::2]) + "龘", encoding="utf-8")
    (folder / "levels.json").write_text(json.dumps({"level 1": {"texts": list(CHINESE[:30])}}), encoding="utf-8")
    (folder / "symbols.txt").write_text("<|user|>\n<|assistant|>\n", encoding="utf-8")


def encode_lines(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def change_slightly(record: dict[str, str]) -> dict[str, str]:
    return record | {"text": record["text"] + " at the end"}


class TextDraw:
    """Draws documents: words by Zipf's law, Chinese, code and numbers."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        syllables = [first + vowel + last for first in "bcdfglmnprstvw" for vowel in "aeiou" for last in ("", "n", "r")]
        self._words = ["".join(generator.choices(syllables, k=1 + number % 4)) for number in range(NUM_WORDS)]
        self._weights = [1 / (rank + 3) for rank in range(NUM_WORDS)]

    def draw_record(self, number: int) -> dict[str, str]:
        """Fields `text` and `title`."""
        parts = [self._random.choice([self._draw_sentence, self._draw_chinese, self._draw_code])() for _ in range(12)]
        return {"text": self._random.choice(["\n", " ", "\n\n"]).join(parts), "title": f"{number} {parts[0][:20]}"}

    def _draw_sentence(self) -> str:
        words = self._random.choices(self._words, self._weights, k=self._random.randint(3, 18))
        return " ".join(words).capitalize() + self._random.choice([".", "!", "?", ", etc.  "])

    def _draw_chinese(self) -> str:
        return "".join(self._random.choices(CHINESE, k=self._random.randint(4, 20))) + "。"

    def _draw_code(self) -> str:
        name, value = self._random.choice(self._words), self._random.randint(0, 99999)
        return f"def {name}(x):\n    return x + {value}  # {value / 7:.3f}\n"


# --- models ----------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """A folder of random bf16 weights for each of MODELS; and in the forms that older versions have written."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    for name, (class_name, changes, options) in MODELS.items():
        sizes: Mapping[str, Any] = GPT2_SIZES if class_name == "GPT2Config" else SIZES
        torch.manual_seed(SEED)
        configuration = getattr(transformers, class_name)(**{**sizes, **changes})
        model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name, **options)
    change_into_tinyllm(folder / "tinyllm" / "config.json")
    weights = load_file(folder / "gpt2" / "model.safetensors")
    published = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    published |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(3)}
    for name in ("gpt2-published", "llama-pickled"):
        (folder / name).mkdir()
        source = folder / name.split("-")[0]
        (folder / name / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(published, folder / "gpt2-published" / "model.safetensors")
    torch.save(load_file(folder / "llama" / "model.safetensors"), folder / "llama-pickled" / "pytorch_model.bin")


def change_into_tinyllm(path: Path) -> None:
    """tiny-llm-zh has Qwen2's layers under Qwen2's names, and a class of its own."""
    config = json.loads(path.read_text())
    for name in ("layer_types", "use_sliding_window", "max_window_layers", "num_key_value_heads"):
        config.pop(name, None)
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"model_type": "tinyllm", "architectures": ["TinyllmForCausalLM"], "rope_theta": theta}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tinyllm.TinyllmForCausalLM"}
    path.write_text(json.dumps(config, indent=2))


# --- tables and sentences --------------------------------------------------------------------------------------------


def write_tables(folder: Path) -> None:
    """Invented runs under the published header, losses that follow a law, and a config that nothing can convert."""
    (folder / "runs.csv").write_text("\n".join([",".join(RUN_COLUMNS), *RUN_ROWS]) + "\n")
    generator = random.Random(SEED)
    lines = ["run,num_parameters,num_tokens,loss"]
    for size in (40e6, 130e6, 400e6, 1.3e9):
        for ratio in (5, 12, 30, 80):
            loss = (1.82 + 480 / size**0.35 + 2080 / (size * ratio) ** 0.37) * (1 + 0.004 * generator.uniform(-1, 1))
            lines.append(f"{size / 1e6:.0f}m-{ratio},{size:.0f},{size * ratio:.0f},{loss:.6f}")
    (folder / "losses.csv").write_text("\n".join(lines) + "\n")
    refused: dict[str, dict[str, Any]] = {
        "unknown": {"model_type": "mamba"},
        "refused": {"hidden_act": "gelu", "sliding_window": 128, "num_attention_heads": 5, "quantization_config": {}},
        "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "attn_logit_softcapping": 30.0},
    }
    for name, changes in refused.items():
        config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6, **changes}))


def write_punkt_model(folder: Path) -> None:
    """A Punkt model trained on a few sentences, where nltk looks for one below NLTK_DATA."""
    from nltk.tabdata import TabEncoder
    from nltk.tokenize.punkt import PunktTrainer

    text = "Dr. Jones saw Mr. Brown. Dr. Smith did not. He left. Mr. Brown slept. Dr. Jones ate. " * 40
    parameters, encode = PunktTrainer(text).get_params(), TabEncoder()
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text(encode.set2txt(sorted({*parameters.abbrev_types, "dr"})))
    (folder / "collocations.tab").write_text(encode.tups2tab(sorted(parameters.collocations)))
    (folder / "ortho_context.tab").write_text(encode.ivdict2tab(parameters.ortho_context))
    (folder / "sent_starters.txt").write_text(encode.set2txt(sorted(parameters.sent_starters)))
