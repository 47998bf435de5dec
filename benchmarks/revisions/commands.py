"""The command lines that compare_revisions.py runs in a checkout, by section.

A section is a folder: its commands run in it one after the other, and every file that one of them leaves there is
recorded. The first word is a path in the checkout, `-m` a module of it; words NAME=value before that go into the
environment. Only what users type is here, so modules of the package may move freely.
"""

from collections.abc import Mapping
from pathlib import Path

Commands = Mapping[str, str]

TOKENIZER = "../tokenizer/toy.model"
DATA = "../tokenizer/train_text_document"
TEXTS = "../text/a.jsonl ../text/b.jsonl.gz ../text/c.jsonl.zst ../text/d.json ../text/e.txt ../text/f.parquet"
DENSE_MODELS = (
    *("llama", "llama-biases", "llama-rope3", "llama-linear", "llama-shards", "llama-pickled", "mistral", "qwen2"),
    *("qwen3", "phi3", "seed-oss", "smollm3", "granite", "helium", "gpt2", "gpt2-gelu", "gpt2-published", "tinyllm"),
)
MOE_MODELS = ("mixtral", "qwen2-moe", "qwen3-moe", "qwen3-moe-packed")
FORWARD_MODELS = ("llama-rope3", "gpt2", "qwen2-moe")  # also computed by Megatron and by transformers
MODELS_WITHOUT_GGUF = (*MOE_MODELS, "gpt2", "gpt2-gelu", "gpt2-published")
LLAMA_CPP_MODELS = ("qwen3",)  # also loaded by llama.cpp

# --- tokenizer: first, since the other sections use what it makes ----------------------------------------------------

TRAIN_TOKENIZER = "tools/tokenizer_train.py --input ../text/a.jsonl ../text/large.jsonl --json --output"
TOKENIZER_COMMANDS = {
    "train": f"{TRAIN_TOKENIZER} toy.model --vocab-size 1201",
    "train-symbols": f"{TRAIN_TOKENIZER} symbols.model --vocab-size 900 --max-bytes 300000 "
    "--user-defined-symbols-file ../text/symbols.txt --required-chars-file ../text/characters.txt --seed 7",
    "train-weighted": "tools/tokenizer_train.py --input 0.7 ../text/b.jsonl.gz 0.3 ../text/c.jsonl.zst --json "
    "--preset tiny-llm-zh-20k --vocab-size 800 --max-bytes 60000 --output weighted.model",
    "merge-characters": "tools/tokenizer_merge.py --base toy.model --other symbols.model --json "
    "--output characters.model",
    "merge-levels": "tools/tokenizer_merge.py --base weighted.model --other symbols.model --output levels.model --json "
    "--required-chars-file ../text/levels.json",
    "merge-vocabulary": "tools/tokenizer_merge.py --base toy.model --other weighted.model --output extended.model "
    "--mode vocabulary --user-defined-symbols-file ../text/symbols.txt --json",
    "merge-zero": "tools/tokenizer_merge.py --base weighted.model --other toy.model --output zero.model --json "
    "--mode vocabulary --scores zero",
    "export": "tools/tokenizer_export.py --tokenizer-model toy.model --save exported --input ../text/a.jsonl "
    "--model-max-length 64",
    "export-extended": "tools/tokenizer_export.py --tokenizer-model extended.model --save exported-extended",
    "analyze": "tools/tokenizer_analyze.py --tokenizers toy.model new=extended.model exported symbols.model --json "
    "--input ../text/a.jsonl ../text/f.parquet --charset ../text/levels.json --csv analysis.csv --plot analysis.png",
    "preprocess": "tools/preprocess_data.py --input ../text/large.jsonl --tokenizer-model toy.model --append-eod "
    "--output-prefix train --workers 2 --json",
}  # fmt: skip

# --- data ------------------------------------------------------------------------------------------------------------

PREPROCESS = f"tools/preprocess_data.py --tokenizer-model {TOKENIZER} --json"
SHARD = f"{PREPROCESS} --input {TEXTS} --workers 1 --append-eod"
DATA_COMMANDS = {
    "all-formats-1": f"{PREPROCESS} --input {TEXTS} --workers 1 --output-prefix one --append-eod",
    "all-formats-2": f"{PREPROCESS} --input {TEXTS} --workers 2 --output-prefix two --append-eod",
    "folder": f"{PREPROCESS} --input ../text --workers 2 --output-prefix folder --max-errors 5",
    "keys": f"{PREPROCESS} --input '../text/[abc].json*' --workers 2 --output-prefix keys --json-keys text title "
    "--prepend-bos",
    "shuffled": f"{PREPROCESS} --input {TEXTS} --workers 2 --output-prefix shuffled --append-eod --shuffle --seed 11",
    "hugging-face-tokenizer": "tools/preprocess_data.py --tokenizer-model ../tokenizer/exported --json --workers 1 "
    "--input ../text/a.jsonl --output-prefix exported",
    "extended-tokenizer": "tools/preprocess_data.py --tokenizer-model ../tokenizer/extended.model --json --workers 2 "
    "--input ../text/a.jsonl ../text/large.jsonl --output-prefix extended",
    "weighted-tokenizer": "tools/preprocess_data.py --tokenizer-model ../tokenizer/weighted.model --json --workers 2 "
    "--input ../text/a.jsonl ../text/large.jsonl --output-prefix weighted",
    "sentences": f"{PREPROCESS} --input ../text/a.jsonl --workers 1 --output-prefix sentences --split-sentences",
    "broken": f"{PREPROCESS} --input ../text/broken.jsonl --workers 1 --output-prefix broken --max-errors 3",
    **{f"shard-{i}": f"{SHARD} --output-prefix shard --shard {i}/3" for i in range(3)},
    "merge": "tools/merge_data.py --input 'shard-*_text_document' --output-prefix merged_text_document --json",
    "merge-shuffled": "tools/merge_data.py --input one_text_document shuffled_text_document --shuffle --seed 3 "
    "--output-prefix both_text_document --json",
    "again": f"{PREPROCESS} --input {TEXTS} --workers 2 --output-prefix two --append-eod",
    "dedup": "tools/dedup_data.py --input ../text/twice.jsonl ../text/a.jsonl --output unique.jsonl --json "
    "--report removed.jsonl",
    "dedup-near": "tools/dedup_data.py --input ../text/twice.jsonl ../text/e.txt ../text/f.parquet --output near.jsonl "
    "--report removed-near.jsonl --near-duplicates --ignore-whitespace --workers 2 --threshold 0.7 --json",
    "blend": "tools/blend_data.py a=one_text_document b=folder_text_document keys_title_document --json "
    "--temperature 2 --train-tokens 500K --seq-length 64 --max-epochs 2 --cap-epochs --output blend.txt",
    "blend-weights": "tools/blend_data.py one_text_document folder_text_document --weights 3 1 --split 90,8,2",
    "inspect": f"tools/inspect_data.py one_text_document folder_text_document --tokenizer-model {TOKENIZER} --verify "
    "--top 30 --samples 3 --json",
    "inspect-files": "tools/inspect_data.py one_text_document --csv lengths.csv --plot lengths.png",
    "inspect-document": f"tools/inspect_data.py one_text_document --tokenizer-model {TOKENIZER} --document 5",
    "inspect-search": f"tools/inspect_data.py one_text_document --tokenizer-model {TOKENIZER} --search 春 --json",
    "cache": f"tools/build_data_cache.py --preset hammer-tiny --data-path 0.6 {DATA} 0.4 one_text_document "
    f"--tokenizer-model {TOKENIZER} --split 90,10,0 --vocab-size 1201 --data-cache-path indices --train-iters 30 "
    "--lr-warmup-iters 3",
}  # fmt: skip

# --- training: every layout, and what checkpoints go through ---------------------------------------------------------

TOUR_COMMANDS = {"tour": "STEPS=4 OUTPUT_DIR=. examples/parallel_tour_cpu.sh"}

TOY_MODEL = (
    "--num-layers 4 --hidden-size 96 --ffn-hidden-size 176 --num-attention-heads 8 --group-query-attention "
    "--num-query-groups 2 --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 "
    f"--attention-dropout 0 --vocab-size 1201 --tokenizer-model {TOKENIZER}"
)
TOY_MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 80 --moe-shared-expert-intermediate-size 112 "
    "--moe-shared-expert-gate --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall"
)
TOY_RUN = (
    f"--platform cpu --backend torch --data-path {DATA} --split 90,10,0 --micro-batch-size 2 --global-batch-size 8 "
    "--lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 1 --train-iters 4 --save-interval 2 --eval-interval 2 --eval-iters 1"
)
PRETRAIN = "-m megatron_hammer.training.pretrain"
LAUNCH = f"-m torch.distributed.run --standalone --nproc-per-node 2 {PRETRAIN}"
EDIT, EXPORT = "checkpoint_convert/edit_checkpoint.py", "checkpoint_convert/megatron_to_hf.py --verify tensors --json"
IMPORT = "checkpoint_convert/hf_to_megatron.py --json"
INSPECT = "checkpoint_convert/inspect_checkpoint.py"
GGUF = "checkpoint_convert/to_gguf.py --json"
GGUF_TYPES = ("f32", "bf16", "q8_0", "q4_k_m")
TRAINING_COMMANDS = {
    "tp2": f"{LAUNCH} {TOY_MODEL} {TOY_RUN} --precision fp32 --tensor-model-parallel-size 2 --sequence-parallel "
    "--save tp2",
    "reshard": f"{EDIT} reshard --load tp2 --iteration 2 --save pp2 --tensor-model-parallel-size 1 "
    "--pipeline-model-parallel-size 2",
    "pp2-resumed": f"{LAUNCH} {TOY_MODEL} {TOY_RUN} --precision fp32 --pipeline-model-parallel-size 2 --load pp2 "
    "--save pp2",
    "moe": f"{PRETRAIN} {TOY_MODEL} {TOY_MOE} {TOY_RUN} --precision bf16 --save moe",
    "moe-reshard": f"{EDIT} reshard --load moe --save moe-ep2 --expert-model-parallel-size 2",
    "legacy": f"{LAUNCH} {TOY_MODEL} {TOY_RUN} --precision bf16 --tensor-model-parallel-size 2 --ckpt-format torch "
    "--save legacy",
    "load-hf": f"{PRETRAIN} --load-hf ../hf/qwen2 {TOY_RUN} --tokenizer-model {TOKENIZER} --seq-length 32 "
    "--precision fp32 --save continued",
    "weights-only": f"{EDIT} weights-only --load tp2 --save weights",
    "average": f"{EDIT} average tp2/iter_0000002 tp2 pp2 --weights 0.5,0.3,0.2 --save mean",
    "resize-number": f"{EDIT} resize-vocab --load tp2 --vocab-size 1300 --save wider",
    "resize-tokenizer": f"{EDIT} resize-vocab --load tp2 --tokenizer-model ../tokenizer/extended.model --save extended",
    "upcycle": f"{EDIT} upcycle --load tp2 --save upcycled --num-experts 6 --moe-router-topk 4 "
    "--moe-upcycling-granularity 2 --seed 5",
    "export-legacy": f"{EXPORT} --load legacy --save hf-legacy --weights master",
    "export-moe": f"{EXPORT} --load moe-ep2 --save hf-moe --no-tokenizer",
    "export-upcycled": f"{EXPORT} --load upcycled --save hf-upcycled --dtype bf16 --max-shard-gb 0.0005",
    "export-continued": f"{EXPORT} --load continued --iteration 2 --save hf-continued --weights model",
    "inspect": f"{INSPECT} tp2 --statistics --json",
    "inspect-legacy": f"{INSPECT} legacy --weights master --statistics --names '*linear_qkv*' --json",
    "inspect-text": f"{INSPECT} moe-ep2",
    "compare-iterations": f"{INSPECT} tp2 --iteration 2 --compare tp2 --optimizer --json",
    "compare-reshard": f"{INSPECT} moe --compare moe-ep2 --optimizer --json",
    "compare-exported": f"{INSPECT} continued --compare ../hf/qwen2 --ignore-dtype --json",
    **{f"gguf-{kind}": f"{GGUF} --no-verify --load tp2 --save {kind}.gguf --type {kind}" for kind in GGUF_TYPES},
    "extend-hf": "tools/resize_embeddings.py --model hf-legacy --old-tokenizer ../tokenizer/toy.model "
    "--new-tokenizer ../tokenizer/characters.model --save hf-extended --json",
    "sample": "tools/generate_sample.py --model hf-continued --prompt 'the 春' --max-new-tokens 12",
    "sample-greedy": "tools/generate_sample.py --model hf-legacy --prompt 'the 春' --max-new-tokens 12 --temperature 0",
}  # fmt: skip


def build_conversions(models: tuple[str, ...]) -> dict[str, str]:
    """From Hugging Face into a checkpoint, back, and to GGUF where there is a way, for each folder of ../hf."""
    commands: dict[str, str] = {}
    for model in models:
        verify = "logits" if model in FORWARD_MODELS else "tensors"
        commands |= {
            f"{model}-import": f"{IMPORT} --load ../hf/{model} --save megatron/{model} --tokenizer-model {TOKENIZER} "
            f"--verify {verify}",
            f"{model}-export": f"{EXPORT} --load megatron/{model} --save back/{model}",
            f"{model}-compare": f"{INSPECT} megatron/{model} --compare ../hf/{model} --json",
        }
        if model not in MODELS_WITHOUT_GGUF:
            verify = "" if model in LLAMA_CPP_MODELS else "--no-verify"
            command = f"{GGUF} --load back/{model} --save {model}.gguf --type f16 {verify}"
            commands[f"{model}-gguf"] = command.strip()
    first = models[0]
    return commands | {
        f"{first}-import-fp32": f"{IMPORT} --load ../hf/{first} --save fp32 --no-tokenizer --dtype fp32 "
        "--verify tensors",
        f"{first}-export-fp16": f"{EXPORT} --load fp32 --save fp16 --dtype fp16 --vocab-size 1100 --no-tokenizer",
        f"{first}-inspect": f"{INSPECT} fp32 --statistics --json",
    }


# --- scaling ---------------------------------------------------------------------------------------------------------

STUDY = "tools/scaling_study.py"
PROJECTIONS = {
    "hammer-1b4": "--gpu h100-sxm --gpus 8,64,512",
    "tinyllama-1b1": "--gpu a100-sxm-40gb --gpus 8,16 --samples-per-gpu 4",
    "tiny-llm-zh-moe": "--gpu a100-sxm-80gb --gpus 4,16 --top 4",
    "open-llama-7b": "--gpu a100-sxm-80gb --gpus 32,128 --recompute full,selective",
    "llama2-13b": "--gpu h100-sxm --gpus 64 --sharding distributed_optimizer --mfu-convention B",
    "llama3-8b": "--gpu b200-sxm --gpus 8,256 --precision fp8",
    "llama3-70b": "--gpu h100-sxm --gpus 64,1024 --usd-per-gpu-hour 2.5",
    "gpt2-124m": "--gpu v100-sxm3-32gb --gpus 1,8 --precision fp16",
    "llama2-70b": "--gpu h200-sxm --gpus 512,4096 --global-batch-size 1024 --context-parallel-size 1,2",
}
SCALING_COMMANDS = {
    **{f"{preset}-json": f"{STUDY} project --preset {preset} {flags} --json" for preset, flags in PROJECTIONS.items()},
    **{f"{preset}-csv": f"{STUDY} project --preset {preset} {flags} --csv" for preset, flags in PROJECTIONS.items()},
    "study": f"{STUDY} project --preset llama3-70b --gpu h100-sxm --gpus 8,64,512 --output-dir study --top 2",
    "config": f"{STUDY} project --hf-config ../hf/qwen3-moe --gpu h100-sxm --gpus 4 --samples-per-gpu 2 "
    "--train-tokens 1B --json",
    "emit": f"{STUDY} emit --projection study/projection.json --launcher torchrun,slurm,kubernetes --output-dir all",
    "emit-rows": f"{STUDY} emit --projection study/projection.json --rows 512-2 --output-dir rows",
    "validate": f"{STUDY} validate --runs ../tables/runs.csv --output-dir validation --json",
    "cross-validate": f"{STUDY} validate --runs ../tables/runs.csv --cross-validate",
    "calibrate": f"{STUDY} calibrate --runs ../tables/runs.csv --output coefficients.toml --json",
    "project-calibrated": f"{STUDY} project --preset llama3-8b --gpu h100-sxm --gpus 64 "
    "--coefficients coefficients.toml --overlay ../tables/runs.csv",
    "fit": f"{STUDY} fit --table ../tables/losses.csv --budget-flops 1e21 1e22 --output-dir law --json",
}  # fmt: skip

# --- dry runs: every preset at two layouts ---------------------------------------------------------------------------

TP, PP, EP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"
VP = "--num-virtual-stages-per-pipeline-rank"
DRY_RUNS = {
    "hammer-1b4": ("--world-size 64", f"--world-size 64 {TP} 2 --sequence-parallel {PP} 2 --gpu-memory-gib 80"),
    "hammer-1b4-demo": ("--world-size 8",),
    "hammer-tiny": ("--world-size 2 --platform cpu", f"--world-size 4 {TP} 2 {PP} 2 {VP} 2 --platform cpu"),
    "hammer-tiny-moe": ("--world-size 2", f"--world-size 4 {EP} 2 {TP} 2 --sequence-parallel"),
    "tinyllama-1b1": ("--world-size 16", f"--world-size 16 {TP} 4 --recompute-granularity selective"),
    "tiny-llm-zh-16m": ("--world-size 1", f"--world-size 6 {TP} 2 {PP} 3"),
    "tiny-llm-zh-42m": ("--world-size 2",),
    "tiny-llm-zh-92m": ("--world-size 8",),
    "tiny-llm-zh-210m": ("--world-size 8",),
    "tiny-llm-zh-440m": ("--world-size 8",),
    "tiny-llm-zh-1b5": ("--world-size 8", f"--world-size 8 {PP} 4 {VP} 3 --precision fp32"),
    "tiny-llm-zh-moe": ("--world-size 8", f"--world-size 8 {EP} 8"),
    "open-llama-7b": ("--world-size 32",),
    "llama2-7b": ("--world-size 32", f"--world-size 48 {PP} 3 --decoder-first-pipeline-num-layers 10"),
    "llama2-13b": ("--world-size 64", f"--world-size 64 {TP} 8 --recompute-granularity full --recompute-num-layers 1 "
        "--recompute-method uniform"),
    "llama2-70b": (f"--world-size 256 {TP} 8 {PP} 4", f"--world-size 512 {TP} 8 {PP} 8 {VP} 5 --gpu-memory-gib 80"),
    "llama3-8b": ("--world-size 64", f"--world-size 64 {TP} 4 --backend te --context-parallel-size 2"),
    "llama3-70b": (f"--world-size 512 {TP} 8 {PP} 4 --global-batch-size 512",),
    "llama3-405b": ("--world-size 16384",),
    "qwen3-0.6b": ("--world-size 8",),
    "qwen3-1.7b": ("--world-size 16",),
    "qwen3-4b": (f"--world-size 16 {TP} 4",),
    "qwen3-8b": ("--world-size 32", f"--world-size 32 {TP} 2 {PP} 2 {VP} 3"),
    "qwen3-30b-a3b": ("--world-size 64",),
    "smollm3-3b": ("--world-size 16", f"--world-size 16 {PP} 2 {VP} 3"),
    "gpt2-124m": ("--world-size 8", f"--world-size 8 {TP} 4 --seq-length 512"),
}  # fmt: skip
RANK = "tools/build_rank.py --json --preset"
DRY_RUN_COMMANDS = {
    **{
        f"{preset}-{number}": f"{PRETRAIN} --preset {preset} --mock-data --dry-run --json {flags}"
        for preset, layouts in DRY_RUNS.items()
        for number, flags in enumerate(layouts)
    },
    "text": f"{PRETRAIN} --preset hammer-1b4 --world-size 16 --mock-data --dry-run {TP} 2",
    "load-hf": f"{PRETRAIN} --load-hf ../hf/mixtral --world-size 2 --mock-data --dry-run --json --platform cpu "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --train-iters 9",
    "data": f"{PRETRAIN} --preset hammer-tiny --vocab-size 1201 --data-path {DATA} --dry-run --json "
    f"--tokenizer-model {TOKENIZER} --world-size 2 --platform cpu --split 98,2,0",
    "rank-of-many": f"{RANK} llama2-70b --world-size 4096 --rank 3071 {TP} 8 {PP} 4",
    "rank-of-experts": f"{RANK} hammer-tiny-moe --world-size 4 --rank 2 {EP} 2",
}  # fmt: skip

# --- wrong command lines: what is refused, and what the sentence names -----------------------------------------------

PLAN = f"{PRETRAIN} --mock-data --dry-run --preset"
WRONG_COMMANDS = {
    "layers": f"{PLAN} llama2-70b {PP} 16 {VP} 2 --world-size 4096 --mtp-num-layers 1",
    "cuts": f"{PLAN} hammer-tiny {TP} 3 --world-size 3 --min-lr 1 --train-iters 5 --rampup-batch-size 2 2 8 "
    "--fp8-format hybrid --platform cpu",
    "experts": f"{PLAN} hammer-tiny-moe {EP} 3 --world-size 3 --moe-router-topk 5 --platform cpu",
    "batch": f"{PLAN} hammer-tiny --world-size 3 --eval-global-batch-size 4 --seq-length 512 --lr nan --platform cpu",
    "memory": f"{PLAN} llama2-70b --world-size 32 --gpu-memory-gib 40",
    "files": f"{PRETRAIN} --preset hammer-tiny --dry-run --data-path nowhere/corpus --tokenizer-model nowhere/t.model "
    "--load nowhere --save new --sequence-parallel --platform cpu",
    "flag": f"{PLAN} hammer-tiny --no-such-flag",
    "preset": f"{PLAN} hammer-2b8 --world-size 8",
    "megatron": f"{PLAN} hammer-tiny --log-interval 2 --log-memory-interval 3 --platform cpu",
    "rank": f"{RANK} hammer-tiny --world-size 4 --rank 4",
    "compare-runs": "tools/compare_runs.py --runs a=nowhere.jsonl a=../text/a.jsonl",
    "no-input": f"{PREPROCESS} --input ../text/none.jsonl --output-prefix x",
    "key": f"{PREPROCESS} --input ../text/a.jsonl --json-keys content --output-prefix x --workers 1",
    "record": f"{PREPROCESS} --input ../text/broken.jsonl --output-prefix x --workers 1",
    "workers": f"{PREPROCESS} --input ../text/a.jsonl --output-prefix x --workers 0",
    "shard": f"{PREPROCESS} --input ../text/a.jsonl --output-prefix x --workers 1 --shard 5/3",
    "tokenizer": "tools/preprocess_data.py --tokenizer-model ../text/a.jsonl --input ../text/a.jsonl --output-prefix x",
    "merge": "tools/merge_data.py --input ../tokenizer/train_text_document nowhere --output-prefix x",
    "merge-seed": "tools/merge_data.py --input ../tokenizer/train_text_document --output-prefix x --seed 3",
    "threshold": "tools/dedup_data.py --input ../text/a.jsonl --output x.jsonl --near-duplicates --threshold 2",
    "budget": f"tools/blend_data.py {DATA} --train-tokens 1M --train-iters 5 --max-epochs 0",
    "blend": f"tools/blend_data.py {DATA} nowhere --weights 1 -1",
    "inspect-data": f"tools/inspect_data.py {DATA} --document 3 --search x --top -1 --plot x.pdf",
    "document": f"tools/inspect_data.py {DATA} --tokenizer-model {TOKENIZER} --document 5000",
    "vocabulary": f"{TRAIN_TOKENIZER} x.model --vocab-size -1 --character-coverage 0.5",
    "merge-tokenizers": f"tools/tokenizer_merge.py --base {TOKENIZER} --other {TOKENIZER} --scores zero "
    "--output x.model",
    "analyze": f"tools/tokenizer_analyze.py --tokenizers {TOKENIZER}",
    "gpus": f"{STUDY} project --preset llama3-70b --gpu a100-sxm-80gb --gpus 8,x --precision fp8",
    "gpu": f"{STUDY} project --preset llama3-70b --gpu h1000 --gpus 8",
    "validate": f"{STUDY} validate --cross-validate",
    "emit": f"{STUDY} emit --projection ../hf/llama/config.json --output-dir x",
    "model-type": f"{IMPORT} --load ../tables/unknown --save x",
    "fields": f"{IMPORT} --load ../tables/refused --save x",
    "window": f"{IMPORT} --load ../tables/window --save x",
    "weights": f"{EXPORT} --load ../hf/llama --save x",
    "average": f"{EDIT} average nowhere nowhere --weights a,b --save x",
    "reshard": f"{EDIT} reshard --load ../hf --save x --tensor-model-parallel-size 5",
    "inspect": f"{INSPECT} ../hf/llama --optimizer --names a --statistics --compare ../hf/qwen2",
    "forward": f"{INSPECT} ../hf/llama --compare ../hf/qwen2 --forward logits",
    "gguf": f"{GGUF} --load ../hf/gpt2 --save x.gguf --no-verify",
    "resize": f"tools/resize_embeddings.py --model ../hf/llama --old-tokenizer {TOKENIZER} --save x "
    "--new-tokenizer ../tokenizer/symbols.model",
}  # fmt: skip


def build_data_dir_commands(data_dir: Path) -> dict[str, str]:
    """Commands on published tables and real tokenizers, for what the folder holds of them."""
    tables = {name: data_dir / "scaling" / f"published_{name}.csv" for name in ("runs", "memory", "moe")}
    model, corpora = data_dir / "tokenizer" / "hammerllm.model", sorted((data_dir / "corpus").glob("*.jsonl"))
    other, characters = data_dir / "tokenizer" / "llama2-7b.model", data_dir / "tokenizer" / "common_char_file.txt"
    commands = {
        "validate-runs": (tables["runs"], f"{STUDY} validate --runs {tables['runs']} --json"),
        "validate-moe": (tables["moe"], f"{STUDY} validate --runs {tables['moe']} --json"),
        "validate-memory": (tables["memory"], f"{STUDY} validate --memory {tables['memory']} --json"),
        "calibrate": (tables["runs"], f"{STUDY} calibrate --runs {tables['runs']} --output all.toml --json"),
        "export-tokenizer": (model, f"tools/tokenizer_export.py --tokenizer-model {model} --save exported"),
        "merge-tokenizers": (
            characters,
            f"tools/tokenizer_merge.py --base {other} --other {model} --required-chars-file {characters} "
            "--output merged.model --json",
        ),
    }
    for path in corpora:
        preprocess = f"tools/preprocess_data.py --input {path} --json --workers 2 --tokenizer-model"
        commands |= {
            f"preprocess-{path.stem}": (model, f"{preprocess} {model} --output-prefix {path.stem}"),
            f"preprocess-{path.stem}-other": (other, f"{preprocess} {other} --output-prefix {path.stem}-other"),
        }
    return {name: command for name, (needed, command) in commands.items() if needed.exists()}


def build_sections(data_dir: Path | None) -> dict[str, Commands]:
    """Every section with its commands; the first one must end before the others begin, which are independent."""
    sections: dict[str, Commands] = {
        "tokenizer": TOKENIZER_COMMANDS,
        "tour": TOUR_COMMANDS,
        "dry_run": DRY_RUN_COMMANDS,
        "training": TRAINING_COMMANDS,
        "convert_dense": build_conversions(DENSE_MODELS),
        "convert_moe": build_conversions(MOE_MODELS),
        "wrong": WRONG_COMMANDS,
        "data": DATA_COMMANDS,
        "scaling": SCALING_COMMANDS,
    }
    if data_dir is not None:
        sections["published"] = build_data_dir_commands(data_dir.resolve())
    return sections
