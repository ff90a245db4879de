"""The command line: its usage, its files and its errors; then against a real server."""

import argparse
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fullpipe import assemble_command, contract
from fullpipe.cli import main
from fullpipe.client import Picture
from fullpipe.generate import describe, name_output, write

PROMPT = "a red circle on a white background"


@pytest.fixture
def closed_url():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


class TestUsage:
    def test_generate_has_every_input_of_the_contract(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["generate", "--help"])
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for tensor in contract.STREAM_INPUTS:
            if tensor.name == "prompt":
                assert "PROMPT what to draw" in text
            elif not tensor.name.endswith("_b64"):
                assert f"--{tensor.name.replace('_', '-')} " in text
        assert "b64" not in text

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ("", "bls"),
            ("--device cuda", "bls"),
            ("--device cuda --engine compiled", "loop"),
            ("--device cuda:0,cuda:1 --engine compiled", "loop"),
            ("--engine compiled", "bls"),
            ("--device cuda --engine compiled --unet bls", "bls"),
            ("--device cuda --engine compiled --vae bls", "bls"),
            ("--vae loop", "loop"),
        ],
    )
    def test_where_the_decoder_runs(self, monkeypatch, options, expected):
        made = []
        monkeypatch.setattr("fullpipe.assemble.assemble", lambda *told, **_: made.append(told[2]))
        parser = argparse.ArgumentParser()
        assemble_command.add_options(parser)
        assemble_command.run(parser.parse_args(["checkpoint", *options.split()]))
        assert made[0].loop.vae == expected

    @pytest.mark.parametrize("command", ["models", "assemble", "serve", "check"])
    def test_every_command_explains_itself(self, capsys, command):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"usage: fullpipe {command}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("argv", "what"),
        [
            ((), "COMMAND"),
            (("paint",), "paint"),
            (("generate",), "PROMPT"),
            (("generate", PROMPT, "--steps", "many"), "--steps"),
            (("generate", PROMPT, "-o", "out.gif"), "out.gif says no format"),
            (("generate", PROMPT, "-o", "out.png", "--output-format", "webp"), "contradict"),
            (("generate", PROMPT, "-o", "nowhere/out.png"), "no folder nowhere"),
            (("generate", PROMPT, "--init-image", "nofile.png"), "cannot read nofile.png"),
            (("generate", PROMPT, "--preview", "full"), "--preview"),
            (("generate", PROMPT, "--header", "no colon"), "NAME: VALUE"),
            (("generate", PROMPT, "--header", "A: b\r\nC: d"), "NAME: VALUE"),
            (("generate", PROMPT, "--header", "@nofile"), "cannot read nofile"),
            (("assemble",), "CHECKPOINT"),
            (("serve", "--http-port", "http"), "--http-port"),
        ],
    )
    def test_wrong_usage(self, capsys, argv, what):
        assert what in usage_error(capsys, *argv)


class TestErrors:
    @pytest.mark.parametrize(
        "argv", [("generate", PROMPT), ("generate", PROMPT, "--no-progress"), ("models",)]
    )
    def test_no_server(self, capsys, closed_url, argv):
        assert main([*argv, "--url", closed_url]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"fullpipe: {closed_url} refused the connection")
        assert err.count("\n") == 1

    def test_a_value_that_no_server_could_take(self, capsys, closed_url):
        assert main(["generate", PROMPT, "--seed", "-1", "--url", closed_url]) == 1
        assert capsys.readouterr().err.startswith("fullpipe: seed=-1 must be in [0, ")

    def test_an_address_of_another_form(self, capsys):
        assert main(["models", "--url", "ftp://host"]) == 1
        assert capsys.readouterr().err.startswith("fullpipe: url=")

    def test_ctrl_c(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            command = [sys.executable, "-m", "fullpipe.cli", "generate", PROMPT, "--url", url]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            connection, _ = server.accept()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            while connection.recv(65_536):
                pass  # the connection is closed, or this would wait for ever
        assert process.returncode == 130
        assert err == "fullpipe: cancelled\n"


class TestFiles:
    @pytest.mark.parametrize(
        ("output", "output_format", "expected"),
        [
            (None, None, ("out.png", "png")),
            (None, "jpeg", ("out.jpg", "jpeg")),
            (None, "raw", ("out.npy", "raw")),
            ("a.PNG", None, ("a.PNG", "png")),
            ("a.jpeg", "jpeg", ("a.jpeg", "jpeg")),
            ("a.npy", None, ("a.npy", "raw")),
            ("a", "webp", ("a", "webp")),
        ],
    )
    def test_names_and_formats(self, tmp_path, output, output_format, expected):
        path, chosen = name_output(None if output is None else tmp_path / output, output_format)
        assert (path.name, chosen) == expected

    def test_one_picture_keeps_the_name(self, tmp_path):
        assert write(Picture({}, [b"x"]), tmp_path / "a.b.png") == [tmp_path / "a.b.png"]
        assert (tmp_path / "a.b.png").read_bytes() == b"x"

    def test_several_pictures_are_numbered(self, tmp_path):
        paths = write(Picture({}, [b"x", b"y"]), tmp_path / "a.png")
        assert [path.name for path in paths] == ["a-0.png", "a-1.png"]
        assert paths[1].read_bytes() == b"y"

    def test_raw_pictures(self, tmp_path):
        pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
        [path] = write(Picture({}, [], pixels), tmp_path / "a.npy")
        np.testing.assert_array_equal(np.load(path), pixels[0])

    def test_what_is_said_of_a_picture(self):
        info = {
            "seed": 7,
            "width": 256,
            "height": 128,
            "steps": 20,
            "sampler_name": "euler",
            "scheduler": "normal",
            "milliseconds": {"text": 3.4, "total": 812.6},
        }
        assert describe(info) == (
            "seed 7, 256x128, 20 steps of euler/normal, text 3 ms, total 813 ms"
        )


SMALL = ("--width", "64", "--height", "64", "--steps", "3", "--seed", "7")


@pytest.mark.triton
class TestRealServer:
    def test_models(self, capsys, triton_url):
        assert main(["models", "--url", triton_url]) == 0
        out = capsys.readouterr().out
        assert "full_pipeline  ready" in out and "euler (default)" in out

    def test_models_as_json(self, capsys, triton_url):
        assert main(["models", "--json", "--url", triton_url]) == 0
        names = [pipeline["name"] for pipeline in json.loads(capsys.readouterr().out)]
        assert "full_pipeline" in names

    @pytest.mark.parametrize("flags", [(), ("--no-progress",)])
    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
    def test_generate(self, capsys, triton_url, tmp_path, flags, name):
        argv = ["generate", PROMPT, "-o", name, "--url", triton_url, *SMALL, *flags]
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        path, said = out.splitlines()
        assert path == name
        assert said.startswith("seed 7, 64x64, 3 steps of euler/normal, ")
        assert said.endswith(" ms")
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)

    def test_stream_and_plain_request_draw_the_same(self, triton_url, tmp_path):
        for name in ("a.png", "a.npy"):
            assert main(["generate", PROMPT, "-o", name, "--url", triton_url, *SMALL]) == 0
        pixels = np.asarray(Image.open(tmp_path / "a.png"))
        np.testing.assert_array_equal(pixels, np.load(tmp_path / "a.npy"))

    def test_start_picture_and_batch(self, capsys, triton_url, tmp_path):
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (64, 72, 3), np.uint8)).save(tmp_path / "start.png")
        Image.new("L", (72, 64), 255).save(tmp_path / "mask.png")
        argv = ["generate", PROMPT, "--init-image", "start.png", "--mask", "mask.png"]
        argv += ["--denoise", "0.7", "--steps", "3", "--batch-size", "2", "--preview", "latent"]
        assert main([*argv, "--url", triton_url]) == 0
        assert capsys.readouterr().out.splitlines()[:2] == ["out-0.png", "out-1.png"]
        assert Image.open(tmp_path / "out-1.png").size == (72, 64)
        assert not list(tmp_path.glob("*preview*"))

    def test_a_refusal(self, capsys, triton_url):
        assert main(["generate", PROMPT, "--sampler-name", "nope", "--url", triton_url]) == 1
        err = capsys.readouterr().err
        assert err.startswith("fullpipe: sampler_name='nope' is unknown, allowed: ")
        assert err.count("\n") == 1

    def test_a_progress_bar_on_a_terminal(self, triton_url):
        terminal, its_end = pty.openpty()
        command = [sys.executable, "-m", "fullpipe.cli", "generate", PROMPT, "--url", triton_url]
        process = subprocess.Popen(
            [*command, *SMALL], stdout=subprocess.PIPE, stderr=its_end, text=True
        )
        os.close(its_end)
        drawn = b""
        try:
            while chunk := os.read(terminal, 4096):
                drawn += chunk
        except OSError:
            pass  # how Linux says that the other end is closed
        out, _ = process.communicate(timeout=60)
        os.close(terminal)
        assert process.returncode == 0 and out.startswith("out.png\n")
        assert b"waiting" in drawn and b"/3 " in drawn
        assert drawn.endswith(b"\r\x1b[K")

    def test_ctrl_c_cancels_the_job(self, triton_url):
        from fullpipe.client import Client

        for flags in ((), ("--no-progress",)):
            command = [sys.executable, "-m", "fullpipe.cli", "generate", PROMPT, *flags]
            command += ["--steps", "150", "--job-id", "interrupted", "--url", triton_url]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            time.sleep(1.5)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            assert (process.returncode, err) == (130, "fullpipe: cancelled\n")
            deadline = time.monotonic() + 5
            while Client(triton_url).cancel("interrupted")["state"] != "unknown":
                assert time.monotonic() < deadline, "the job runs on"
                time.sleep(0.05)
