"""The code that README prints is the code: it runs, or stands in the file that it names."""

import inspect
import re
import textwrap

from conftest import ROOT

from model import GraFT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readmes_forward_is_the_models():
    (forward,) = [block for block in BLOCKS if block.startswith("def forward")]
    assert forward == textwrap.dedent(inspect.getsource(GraFT.forward))


def test_readmes_lines_of_python_tell_one_vehicle_from_another(monkeypatch):
    monkeypatch.chdir(ROOT)
    (lines,) = [block for block in BLOCKS if "load_embedder" in block]
    names = {}
    exec(lines, names)
    similarity = names["embedder"].model.similarity(*[names["features"]] * 2)
    assert similarity[0, 1] > 0.5  # the same vehicle
    assert similarity[:2, 2].max() < 0.4  # another one
