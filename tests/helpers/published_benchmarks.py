"""Benchmark data in the layouts in which their authors publish them, a few made-up questions of each."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SUBJECT = "law"
NUM_QUESTIONS = 6
WORDS = ("dog", "fox", "the lazy dog", "a quick brown fox", "second", "first")
ZH = ("春眠不觉晓", "处处闻啼鸟", "夜来风雨声", "花落知多少", "风雨", "花")


def write_published_data(data_dir: Path) -> Path:
    """A folder for every dataset of the issue: archives of the authors, unpacked."""
    for split, number in (("dev", 5), ("val", NUM_QUESTIONS)):
        write_exam(
            data_dir / "ceval-exam" / split / f"{SUBJECT}_{split}.csv", number, names=("id", "question", "answer")
        )
    for split, number in (("dev", 5), ("test", NUM_QUESTIONS)):
        write_exam(data_dir / "cmmlu_v1_0_1" / split / f"{'agronomy'}.csv", number, names=("", "Question", "Answer"))
    write_english(data_dir)
    return data_dir


def write_exam(path: Path, number: int, *, names: tuple[str, str, str]) -> None:
    """C-Eval's and CMMLU's tables. Some cells have commas, quotes and line ends, as the published ones do."""
    index, question, answer = names
    header = f"{index},{question},A,B,C,D,{answer}\n"
    rows = []
    for row in range(number):
        cells = f'{ZH[(row + 1) % 6]},"{ZH[(row + 2) % 6]},",丙{row},丁,{"ABCD"[row % 4]}'
        rows.append(f'{row},"{ZH[row % 6]}，""{row}""\n下列正确的是____。",{cells}\n')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join(rows), encoding="utf-8-sig")


def write_english(data_dir: Path) -> None:
    """HellaSwag, OpenBookQA, WinoGrande, ARC, BoolQ and PIQA; each split that lm-eval's tasks ask for."""
    rows = range(NUM_QUESTIONS)
    for split in ("train", "val"):
        write_lines(data_dir / "hellaswag" / "data" / f"hellaswag_{split}.jsonl", (hellaswag(row) for row in rows))
    nested = [("OpenBookQA-V1-Sep2018/Data/Main", ("train", "dev", "test"), "{}")]
    nested += [
        (f"ARC-V1-Feb2018-2/{name}", ("Train", "Dev", "Test"), f"{name}-{{}}") for name in ("ARC-Easy", "ARC-Challenge")
    ]
    for folder, splits, name in nested:
        for split in splits:
            write_lines(data_dir / folder / f"{name.format(split)}.jsonl", (science(row) for row in rows))
            # The archives have the same questions as text too, in another shape.
            (data_dir / folder / f"{name.format(split)}.csv").write_text("questionID,question\n1,x (A) y (B) z\n")
    for name in ("train_xl", "train_s", "dev"):
        write_lines(data_dir / "winogrande_1.1" / f"{name}.jsonl", (winogrande(row) for row in rows))
    for name in ("train", "dev"):
        write_lines(data_dir / "BoolQ" / f"{name}.jsonl", (boolq(row) for row in rows))
    for name in ("train", "valid"):
        write_lines(data_dir / "piqa" / f"{name}.jsonl", (piqa(row) for row in rows))
        (data_dir / "piqa" / f"{name}-labels.lst").write_text("".join(f"{row % 2}\n" for row in rows))


def hellaswag(row: int) -> dict[str, Any]:
    return {
        "ind": row, "activity_label": "Running", "ctx_a": f"The {WORDS[row]} jumps.", "ctx_b": "the dog",
        "ctx": "unused", "endings": [f"sleeps [step] {word}." for word in WORDS[1:5]], "label": row % 4,
        "split": "val", "split_type": "indomain", "source_id": "x",
    }  # fmt: skip


def science(row: int) -> dict[str, Any]:
    num_choices = 4 + (row == 1)
    choices = [{"text": WORDS[(row + number) % 6], "label": "ABCDE"[number]} for number in range(num_choices)]
    question = {"stem": f"What sleeps over number {row}?", "choices": choices}
    return {"id": f"Q{row}", "question": question, "answerKey": "ABCD"[(row * 3) % 4]}


def winogrande(row: int) -> dict[str, Any]:
    sentence = f"The dog did not jump over the {WORDS[row]} because _ was lazy."
    return {"qID": str(row), "sentence": sentence, "option1": "the dog", "option2": "it", "answer": str(1 + row % 2)}


def boolq(row: int) -> dict[str, Any]:
    return {
        "question": f"does the {WORDS[row]} sleep",
        "title": "Fox",
        "answer": row % 3 == 0,
        "passage": "The dog sleeps.",
    }


def piqa(row: int) -> dict[str, Any]:
    return {"goal": f"add {row} to the first", "sol1": f"return {WORDS[row]}", "sol2": "the fox does not"}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
