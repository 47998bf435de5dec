"""A Punkt model trained on a few sentences, in the form in which nltk looks for one."""

from pathlib import Path

from nltk.tabdata import TabEncoder
from nltk.tokenize.punkt import PunktTrainer

TRAINING_TEXT = "Dr. Jones saw Mr. Brown. Dr. Smith did not. He left. Mr. Brown slept. Dr. Jones ate. " * 40


def write_punkt_model(nltk_data_dir: Path) -> Path:
    """Write `tokenizers/punkt_tab/english` below a folder that NLTK_DATA may name, and return it."""
    model_dir = nltk_data_dir / "tokenizers" / "punkt_tab" / "english"
    model_dir.mkdir(parents=True)
    params, encode = PunktTrainer(TRAINING_TEXT).get_params(), TabEncoder()
    (model_dir / "abbrev_types.txt").write_text(encode.set2txt({*params.abbrev_types, "dr"}))
    (model_dir / "collocations.tab").write_text(encode.tups2tab(params.collocations))
    (model_dir / "ortho_context.tab").write_text(encode.ivdict2tab(params.ortho_context))
    (model_dir / "sent_starters.txt").write_text(encode.set2txt(params.sent_starters))
    return model_dir
