"""A command line of Megatron-LM's preprocess_data.py is taken, or each flag that cannot be has its sentence."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from megatron_hammer.cli.preprocess_data import LiveLine, build_options, parse_arguments
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import PreprocessProgress, preprocess
from megatron_hammer.errors import ConfigError
from tests.helpers.messages import assert_problems, raises_problem

OURS = ("--input", "a.jsonl", "--tokenizer-model", "t.model", "--output-prefix", "x")


def build(*flags: str) -> PreprocessOptions:
    return build_options(parse_arguments((*OURS, *flags)))


def test_a_usual_command_line_is_taken() -> None:
    flags = "--tokenizer-type HuggingFaceTokenizer --append-eod --workers 4 --partitions 1 --log-interval 1000"
    options = build(*flags.split(), "--dataset-impl", "mmap", "--keep-sequential-samples")
    assert (options.tokenizer_type, options.append_eod, options.num_workers) == ("HuggingFaceTokenizer", True, 4)
    assert build("--tokenizer-hf-no-include-special-tokens").includes_template is False
    assert build("--tokenizer-hf-include-special-tokens").includes_template is True
    assert build().includes_template is None


@pytest.mark.parametrize(
    "flags, field, facts",
    [
        ("--tokenizer-type GPT2BPETokenizer", "tokenizer-type:", ("got GPT2BPETokenizer", "GPT2TokenizerFast")),
        ("--tokenizer-type NullTokenizer", "tokenizer-type:", ("got NullTokenizer", "SentencePiece")),
        ("--vocab-file vocab.json", "vocab-file:", ("got vocab.json", "GPT2TokenizerFast")),
        ("--merge-file merges.txt", "merge-file:", ("got merges.txt", "GPT2TokenizerFast")),
        ("--partitions 4", "partitions:", ("got 4", "--workers", "--shard 0/4")),
        ("--log-interval 0", "log-interval:", ("got 0",)),
        ("--dataset-impl lazy", "dataset-impl:", ("got lazy",)),
        ("--vocab-size 32000", "vocab-size:", ("got 32000", "Drop it")),
        ("--trust-remote-code", "trust-remote-code:", ("ever executed", "Drop it")),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(flags: str, field: str, facts: tuple[str, ...]) -> None:
    with raises_problem(ConfigError, field, *facts):
        build(*flags.split())


def test_all_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build("--vocab-file", "v", "--merge-file", "m", "--partitions", "2")
    assert_problems(caught.value.problems, ("vocab-file:",), ("merge-file:",), ("partitions:",))


def test_the_log_has_a_line_for_every_so_many_documents(capsys: pytest.CaptureFixture[str]) -> None:
    line = LiveLine(10)
    for num_documents in (4, 9, 12, 19, 31):
        line.show(
            PreprocessProgress(
                done_bytes=num_documents, total_bytes=100, num_documents=num_documents, num_tokens=7 * num_documents
            )
        )
    lines = capsys.readouterr().err.splitlines()
    assert [text.partition(" ")[0] for text in lines] == ["12", "31"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, and a template that begins every text with <s>, as Llama's has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<s>", "</s>", "<unk>", "the", "fox", "dog"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_of_a_template_are_spoken_of_and_written_on_demand(tmp_path: Path, tokenizer_dir: Path) -> None:
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    texts = ["the fox", "the dog", "", "fox"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(**options) -> tuple[list[int], list[str]]:
        notes: list[str] = []
        prefix = tmp_path / "-".join(["x", *options])
        inputs = (str(tmp_path / "a.jsonl"),)
        settings = PreprocessOptions(inputs=inputs, tokenizer_path=tokenizer_dir, output_prefix=prefix, **options)
        preprocess(settings, on_note=notes.append)
        ids = list(memoryview(Path(f"{prefix}_text_document.bin").read_bytes()).cast("H"))
        return ids, [note for note in notes if "template" in note]

    def join(parts: Iterable[list[int]]) -> list[int]:
        return [*itertools.chain.from_iterable(parts)]

    theirs = [HuggingFaceTokenizer(str(tokenizer_dir)).text_to_ids(text) for text in texts]
    assert theirs[2] == [0]
    # As Megatron-LM's tool appends it: also to a document that has nothing but the template.
    assert run(includes_template=True, append_eod=True) == (join([*ids, 1] for ids in theirs), [])
    assert run(prepend_bos=True) == (join(ids for ids in theirs if ids != [0]), [])
    ids, (note,) = run()
    assert ids == [token for token in join(theirs) if token]
    assert "<s>" in note
    assert "--prepend-bos" in note
    assert run(includes_template=False, tokenizer_type="HuggingFaceTokenizer") == (ids, [])
    with raises_problem(ConfigError, "tokenizer-type:", "got Llama2Tokenizer", "a Hugging Face tokenizer"):
        run(tokenizer_type="Llama2Tokenizer")
    with raises_problem(ConfigError, "prepend-bos: must not come with", "Drop one"):
        run(includes_template=True, prepend_bos=True)
