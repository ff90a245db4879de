"""The pages of figures show what is stored, and nothing else."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from bench import headlines, report, tables, unet_profile
from bench.record import RESULTS


@pytest.fixture(scope="module")
def documents():
    return report.read(RESULTS)


def test_pages_are_made_of_the_stored_results(documents):
    told = "python -m bench.report makes it anew"
    assert (report.BENCH / "README.md").read_text("utf-8") == report.build(documents, None), told
    readme = report.README.read_text("utf-8")
    assert headlines.page(documents, readme) == readme, told


def test_every_plot_is_there_and_is_a_picture(documents):
    page = report.build(documents, None)
    shown = re.findall(r"\(plots/(\w+\.png)\)", page)
    assert shown
    for name in shown:
        with Image.open(report.BENCH / "plots" / name) as picture:
            assert picture.width > 1000


def test_plots_are_drawn_from_results(documents, tmp_path):
    report.build(documents, tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {section.name for section in report.sections(documents) if section.plot}


def test_missing_results_are_left_out_and_unknown_ones_shown(documents):
    overhead = documents["overhead"]
    assert "What serving costs" in report.build({"overhead": overhead}, None)
    assert report.build({}, None).strip() == report.INTRODUCTION.strip()
    assert headlines.headlines({}).count("\n") == 1
    gpu = {**overhead, "result": {"gpu": "Some GPU", "headline": {"what": "w", "figure": "f"}}}
    page = report.build({"gpu_steps": gpu, "novelty": overhead}, None)
    assert "## On a GPU: steps" in page and "on Some GPU" in page and "## Novelty" in page
    assert report.purpose("gpu_any_thing") == report.purpose("gpu") != ""
    assert "| w | f |" in headlines.headlines({"gpu_steps": gpu})


@pytest.fixture
def gpu_sample(documents):
    """A result of bench/gpu.py made by hand: no machine measured these figures."""
    served = {"assemble_s": 1.5, "ready_s": 8.0}
    way = {"images_per_second": 2.5, "p50_ms": 400.0, "p99_ms": 410.0, "stages_ms": {"loop": 380.0}}
    result = {
        "request": "native size",
        "device": "Some GPU",
        "networks": {"bare_unet": {"2": {"ms": 17.0}}, "relative_error": {"unet": 0.002}},
        "loop": {**served, "one_at_a_time": way, "together": {**way, "concurrency": 16}},
        "bls": {**served, "one_at_a_time": way},
        "loop_over_bare_unet": 1.07,
        "together_over_one": 1.9,
    }
    return {**documents["overhead"], "result": result}


def test_a_gpu_result_has_tables_and_a_headline(gpu_sample):
    document = {"gpu_sd1": gpu_sample}
    page, lines = report.build(document, None), headlines.headlines(document)
    assert (
        "on Some GPU" in page
        and "| 2 | 17 |" in page
        and "| unet | 0.002 |" in page
        and "16 at a time" in page
    )
    assert (
        "SD1.5's architecture on one Some GPU: native size" in lines
        and "1.90 × one at a time" in lines
    )
    assert "the same, one picture" not in lines and "ours over it" not in page


def test_rivals_of_a_gpu_result_have_their_times_and_ratios(gpu_sample):
    sample = {"p50_ms": 800.0, "p99_ms": 900.0}
    parts = {"ksampler": {"p50_ms": 450.0, "p99_ms": 451.0}, "vae_decode": sample}
    gpu_sample["result"]["rivals"] = {
        "diffusers": sample,
        "diffusers_compiled": {"error": "not done after 240 s:\nlast words", "process_s": 240.0},
        "comfyui": {"p50_ms": 500.0, "p99_ms": 510.0, **parts},
    }
    page = report.build({"gpu_sd1": gpu_sample}, None)
    lines = headlines.headlines({"gpu_sd1": gpu_sample})
    assert "| diffusers' pipeline | 800 | 900 | 0.50 × |" in page
    assert "| ComfyUI's KSampler and VAEDecode | 500 | 510 | 0.80 × |" in page
    assert "| … of that, ksampler | 450 | 451 | – |" in page
    assert "compiled: not measured (not done after 240 s: last words)." in page
    assert "0.50 × the time of diffusers' pipeline (800 ms); 0.80 × the time of ComfyUI's" in lines
    assert "compiled" not in lines.replace("overhead", "")


def test_every_benchmark_says_why_its_number_matters(documents):
    for name in documents:
        assert len(report.purpose(name)) > 80, name


def test_plain_tables_hold_every_value():
    result = {
        "a_number": 1.5,
        "group": {"p50_ms": 2.25, "count": 3},
        "nested": {"x": {"one": 4, "more": {"two": 5}}},
        "records": [{"size": 6, "deep": {"seven": 7}}],
        "names": ["eight", "nine"],
    }
    text = tables.plain(json.loads(json.dumps(result)))
    for value in ("1.5", "2.25", "3", "4", "5", "6", "seven 7", "eight, nine"):
        assert value in text


def test_agreement_and_batching_hold_in_the_stored_results(documents):
    """The figures that the README stands on, in the run that is stored."""
    assert 0.9 <= documents["perf_analyzer"]["result"]["agreement"]["perf_analyzer_over_own"] <= 1.1
    over = documents["continuous"]["result"]["continuous_over_at_the_highest_load"]["static"]
    assert over["images_per_second"] > 1 and over["p99_ms"] < 1


def test_kernels_are_told_apart_by_their_names():
    wanted = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution",
        "nvjet_sm90_hsh_168x128_64x5_1x2_h_bz_coopA_bias_TNN": "matrix product",
        "triton_per_fused_add_convolution_native_group_norm_silu_31": "norms: sums",
        "triton_poi_fused_convolution_native_group_norm_silu_117": "norms applied",
        "triton_poi_fused_gelu_mul_split_view_17": "element by element",
        "triton_tem_fused_mm_3": "matrix product, by Triton",
        "Memcpy DtoD (Device -> Device)": "copies",
        "ncclKernel": "other",
        "triton_poi_fused_add_as_strided_convolution_mul_permute_silu_view_11": "norms applied",
    }
    assert {name: unet_profile.kind_of(name) for name in wanted} == wanted


def test_a_profile_adds_up_and_is_shown(tmp_path):
    kernels = [("sdpa", 2.0, 1.0), ("nvjet", 1.0, 3.0), ("triton_poi_fused_mul", 4.0, 1.0)]
    by_rows = {"2": unet_profile.by_kind(kernels), "16": unet_profile.by_kind(kernels[:2])}
    assert by_rows["2"]["kernels_ms"] == 5.0
    assert by_rows["2"]["kinds"]["matrix product"] == {"ms": 3.0, "percent": 60.0, "kernels": 1}
    assert by_rows["2"]["longest"][0]["kernel"] == "nvjet"
    decoder = unet_profile.by_kind(kernels[1:])
    result = {
        "network": "a UNet",
        "device": "no GPU: made by hand",
        "by_rows": by_rows,
        "decoder": decoder,
    }
    document = {"command": "c", "machine": {}, "versions": {}, "result": result}
    page = report.build({"unet_profile_sd1": document}, tmp_path)
    assert "| kind of kernel | 2 rows, ms | 16 rows, ms | decoder, ms |" in page
    assert "| matrix product | 3.00 (60 %) | 3.00 (75 %) | 3.00 (75 %) |" in page
    assert "| element by element | 1.00 (20 %) | – | 1.00 (25 %) |" in page
    assert (tmp_path / "unet_profile_sd1.png").stat().st_size > 5000
