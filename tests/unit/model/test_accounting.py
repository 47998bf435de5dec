"""The arithmetic about a model is importable without torch."""

import subprocess
import sys


def test_presets_and_accounting_import_neither_torch_nor_megatron():
    heavy = "('torch', 'megatron', 'transformers', 'numpy')"
    program = (
        "import sys; import megatron_hammer.presets.catalogue, megatron_hammer.model.accounting;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
