"""``pytest --no-skips``: what CI holds the tests of an extra to."""

import pathlib
import subprocess
import sys

TESTS = {
    "mark": "import pytest\n\n@pytest.mark.skipif(True, reason='lacks it')\ndef test(): pass",
    "call": "import pytest\n\ndef test(): pytest.skip('lacks it')",
    "module": "import pytest\n\npytest.importorskip('no_such_module', reason='lacks it')",
    "passes": "def test(): pass",
}


def last_line(folder, option):
    """What pytest says in the end of tests that are skipped at each of the three times."""
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c"]
    command += ["/dev/null", f"--rootdir={folder}", "--continue-on-collection-errors", option]
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [*command, str(folder)], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("lacks it") >= 3, done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines()[-1]


def test_a_skipped_test_fails_when_asked_to(tmp_path):
    for name, text in TESTS.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    code, said = last_line(tmp_path, "-rs")
    assert code == 0
    assert "1 passed, 3 skipped" in said
    code, said = last_line(tmp_path, "--no-skips")
    assert code == 1
    assert "1 failed, 1 passed, 2 errors" in said  # while it runs; before it, and before its file
