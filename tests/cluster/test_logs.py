"""What libraries print goes to the log and not to the terminal."""

import logging

import pytest

from toolkit.cluster.logs import log_to_file, prints_to_log, show_errors_only


@pytest.fixture
def logged(caplog, monkeypatch):
    """The lines of the toolkit's log, as ``log_to_file`` sets it up."""
    monkeypatch.setattr(logging.getLogger("toolkit"), "propagate", True)
    caplog.set_level(logging.INFO, logger="toolkit")
    return caplog


def test_what_bitsandbytes_says_at_every_product_is_logged_once(tmp_path):
    log_to_file(tmp_path / "log.txt")
    for _ in range(3):
        for dtype in ("bfloat16", "float32"):
            text = "MatMul8bitLt: inputs will be cast from %s to float16 during quantization"
            logging.getLogger("bitsandbytes.autograd._functions").warning(text, dtype)
        logging.getLogger("transformers.trainer").warning("something else")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [sum(word in line for line in lines) for word in ("bfloat16", "float32", "something else")] == [1, 1, 3]


def test_names_that_torch_replaces_are_not_logged_and_other_warnings_are(tmp_path):
    log_to_file(tmp_path / "log.txt")
    for text in ("`torch.distributed.all_gather_into_tensor` is deprecated. Please use", "`other` is deprecated."):
        logging.getLogger("py.warnings").warning("%s", f"distributed.py:85: FutureWarning: {text}")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert "`other`" in line


def test_what_a_library_prints_is_logged_line_by_line(logged, capsys):
    with prints_to_log():
        print("begin bf16_optimizer\n\nMA 0.0 GB         Max_MA 0.0 GB")
    assert capsys.readouterr().out == ""
    assert logged.messages == ["begin bf16_optimizer", "MA 0.0 GB         Max_MA 0.0 GB"]


def test_what_was_printed_before_an_error_is_logged_and_the_error_is_passed_on(logged):
    with pytest.raises(RuntimeError), prints_to_log():
        print("initializing")
        raise RuntimeError
    assert logged.messages == ["initializing"]


@pytest.mark.parametrize("name", ["bitsandbytes.backends.cpu.ops", "transformers.modeling_utils", "py.warnings"])
def test_commands_without_a_log_show_errors_of_libraries_only(name):
    show_errors_only()
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    assert logging.getLogger(name).isEnabledFor(logging.ERROR)
