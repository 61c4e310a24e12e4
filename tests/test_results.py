"""What an inference run leaves: CTs on the very grid of their masks, and a report whose numbers are right."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.image import imread
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

import common.results
from common.bundle import save_checkpoint, save_weights
from common.faithfulness import faithfulness
from common.results import CheckCases, ResultWriter, save_ct

FACTS = {"bundle": "abdominal_ct_sdm", "image_size": 64, "iteration": 7}
SETTINGS = {"sampler": "ddim", "sampling_steps": 25, "seed": 3}


def oblique(degrees: float, origin: tuple[float, float, float]) -> np.ndarray:
    """An affine that is no multiple of the axes, with three spacings."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (degrees, -7, 4), degrees=True).as_matrix() @ np.diag((-0.8, 1.3, 4.0))
    affine[:3, 3] = origin
    return affine


SFORM, QFORM = oblique(12, (90.5, -120.25, 800)), oblique(-5, (-3, 4, 17))


def source_mask(path: Path, sform_code: int, qform_code: int, kind=nib.Nifti1Image, dtype=np.uint8) -> nib.Nifti1Image:
    """A mask (7, 5, 4) with two different affines."""
    label_map = np.arange(7 * 5 * 4).reshape(7, 5, 4) % 17
    image = kind(label_map.astype(dtype), None)
    image.header.set_qform(QFORM, qform_code)
    image.header.set_sform(SFORM, sform_code)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"], image.header["descrip"] = 16, b"labels"
    image.header.set_intent("label", name="organs")
    nib.save(image, path)
    return nib.load(path)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (1, 0), (0, 1), (4, 3), (0, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_ct_lies_on_the_grid_of_its_mask(tmp_path, codes, suffix):
    source = source_mask(tmp_path / f"mask{suffix}", *codes)
    hu = np.random.default_rng(0).integers(-1000, 3000, source.shape).astype(np.int16)
    save_ct(tmp_path / "ct.nii.gz", hu, source.affine, tmp_path / f"mask{suffix}")
    ct = nib.load(tmp_path / "ct.nii.gz")

    assert ct.shape == source.shape
    np.testing.assert_array_equal(ct.affine, source.affine)
    for form in ("get_sform", "get_qform"):
        (expected, expected_code), (affine, code) = (getattr(i.header, form)(coded=True) for i in (source, ct))
        assert code == expected_code
        if code:
            np.testing.assert_array_equal(affine, expected)
    assert ct.header.get_xyzt_units() == source.header.get_xyzt_units()
    np.testing.assert_array_equal(ct.header.get_zooms(), source.header.get_zooms())

    assert ct.get_data_dtype() == np.int16
    assert (ct.dataobj.slope, ct.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(ct.dataobj), hu)
    assert ct.header["cal_max"] == 0 and ct.header.get_intent()[0] == "none"  # no longer labels
    assert bytes(ct.header["descrip"]).rstrip(b"\0") == b"synthetic CT"


def test_the_voxel_type_and_scale_of_the_mask_are_not_taken_over(tmp_path):
    mask = nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4))
    mask.header.set_data_dtype(np.uint8)
    mask.header.set_slope_inter(0.5, -3)
    nib.save(mask, tmp_path / "mask.nii.gz")
    hu = np.arange(-13, 14, dtype=np.int16).reshape(3, 3, 3) * 100
    save_ct(tmp_path / "ct.nii.gz", hu, np.eye(4), tmp_path / "mask.nii.gz")
    ct = nib.load(tmp_path / "ct.nii.gz")
    assert ct.get_data_dtype() == np.int16 and (ct.dataobj.slope, ct.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(ct.dataobj), hu)


def test_a_mask_of_another_format_gives_its_affine(tmp_path):
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    save_ct(tmp_path / "ct.nii.gz", hu, SFORM, tmp_path / "mask.mha")
    ct = nib.load(tmp_path / "ct.nii.gz")
    np.testing.assert_allclose(ct.affine, SFORM, atol=1e-4)  # float32 in the header
    assert ct.get_data_dtype() == np.int16 and ct.get_sform(coded=True)[1] > 0
    np.testing.assert_array_equal(np.asarray(ct.dataobj), hu)


def test_a_mask_in_nifti_2_is_understood(tmp_path):
    source = source_mask(tmp_path / "mask.nii", 2, 1, kind=nib.Nifti2Image)
    save_ct(tmp_path / "ct.nii.gz", np.zeros(source.shape, np.int16), source.affine, tmp_path / "mask.nii")
    ct = nib.load(tmp_path / "ct.nii.gz")
    np.testing.assert_allclose(ct.affine, source.affine, atol=1e-4)
    assert ct.get_sform(coded=True)[1] == 2 and ct.get_qform(coded=True)[1] == 1


def test_a_single_slice_stored_with_a_fourth_axis_keeps_its_place(tmp_path):
    mask = nib.Nifti1Image(np.ones((6, 5, 1, 1), np.uint8), SFORM)
    nib.save(mask, tmp_path / "mask.nii.gz")
    save_ct(tmp_path / "ct.nii.gz", np.zeros((6, 5, 1), np.int16), SFORM, tmp_path / "mask.nii.gz")
    ct = nib.load(tmp_path / "ct.nii.gz")
    assert ct.shape == (6, 5, 1)
    np.testing.assert_allclose(ct.affine, SFORM, atol=1e-4)


# ------------------------------------------------------------------------------------------------- a whole run


def case(folder: Path, name: str, organ: int) -> tuple[dict, dict]:
    """Batch item and output of one case: an 8³ mask, half organ, half body, CT 50 HU in the organ, -20 ± 10 around."""
    label_map = np.full((8, 8, 8), 16, np.uint8)
    label_map[:4] = organ
    nib.save(nib.Nifti1Image(label_map, SFORM), folder / f"{name}.nii.gz")
    hu = np.where(label_map == organ, 50, -20).astype(np.int16)
    hu[4:, ::2] -= 10
    hu[4:, 1::2] += 10
    meta = {"filename_or_obj": str(folder / f"{name}.nii.gz")}
    volume = MetaTensor(torch.from_numpy(label_map)[None], affine=torch.from_numpy(SFORM), meta=meta)
    return {"case": name, "label_map": volume}, {"pred": torch.from_numpy(hu)[None]}


def evaluator(folder: Path, cases: list[tuple[dict, dict]], fail_at: int | None = None) -> Engine:
    """A fake evaluator that knows its outputs, with a `ResultWriter` into `folder / "output"`."""
    outputs = {item["case"]: output for item, output in cases}

    def evaluate(engine: Engine, batch: list[dict]) -> list[dict]:
        if engine.state.iteration == fail_at:
            raise RuntimeError("in between")
        return [outputs[item["case"]] for item in batch]

    engine = Engine(evaluate)
    engine.state.device = torch.device("cpu")
    if not (folder / "model.pt").exists():
        save_weights(folder / "model.pt", {"weight": torch.zeros(3)}, FACTS)
    ResultWriter(folder / "output", folder / "model.pt", SimpleNamespace(settings=SETTINGS)).attach(engine)
    return engine


def run(folder: Path, cases: list[tuple[dict, dict]], fail_at: int | None = None) -> Path:
    """The folder that a run of the fake evaluator leaves."""
    evaluator(folder, cases, fail_at).run([[item] for item, _ in cases])
    return folder / "output"


def report_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def bins(counts: dict[int, int]) -> list[int]:
    """Twenty bins from -160 HU on with the counts of some, by their lowest HU."""
    return [counts.get(low, 0) for low in range(-160, 240, 20)]


def test_the_report_has_the_numbers_of_the_run(tmp_path, monkeypatch):
    clock = iter((100.0, 102.5, 200.0, 200.25))
    monkeypatch.setattr("common.results.time.perf_counter", lambda: next(clock))
    cases = [case(tmp_path, "first", 6), case(tmp_path, "second", 1)]
    before = datetime.now(UTC) - timedelta(seconds=1)  # the report has whole seconds
    output = run(tmp_path, cases)
    report = report_of(output)

    assert before <= datetime.fromisoformat(report["started"]) <= datetime.now(UTC)
    assert report["settings"] == SETTINGS and report["device"] == "cpu"
    digest = hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    assert report["weights"] == {"file": str(tmp_path / "model.pt"), "sha256": digest, **FACTS}
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["nibabel"] == nib.__version__
    assert report["hu_bins"] == list(range(-160, 241, 20))
    first, second = report["cases"]
    label_map, hu = cases[0][0]["label_map"][0].numpy(), cases[0][1]["pred"][0].numpy()
    assert first == {
        "case": "first",
        "ct": "first_ct.nii.gz",
        "preview": "first_preview.png",
        "shape": [8, 8, 8],
        "seconds": 2.5,
        "label_histogram": {"liver": 256, "body": 256},
        "hu": {
            "liver": {"mean": 50.0, "std": 0.0, "p25": 50.0, "median": 50.0, "p75": 50.0},
            "body": {"mean": -20.0, "std": 10.0, "p25": -30.0, "median": -20.0, "p75": -10.0},
        },
        "hu_histogram": {"synthetic": {"liver": bins({40: 256}), "body": bins({-40: 128, -20: 128})}},
        "faithfulness": faithfulness(label_map, hu, SFORM),
    }
    assert first["faithfulness"]["hu_deviation"] == 25  # 50 HU in a liver of 75 to 135
    assert (second["case"], second["seconds"], list(second["label_histogram"])) == ("second", 0.25, ["spleen", "body"])


def test_the_real_ct_stands_beside_the_synthetic_one(tmp_path):
    item, output = case(tmp_path, "first", 6)
    real = torch.full((1, 8, 8, 8), -1000.0)
    real[:, :4] = 90.0
    measured = report_of(run(tmp_path, [(item, output | {"real": MetaTensor(real)})]))["cases"][0]
    assert measured["hu_histogram"] == {
        "synthetic": {"liver": bins({40: 256}), "body": bins({-40: 128, -20: 128})},
        "real": {"liver": bins({80: 256}), "body": bins({-160: 256})},
    }
    volumes = (item["label_map"][0].numpy(), output["pred"][0].numpy())
    assert measured["faithfulness"] == faithfulness(*volumes, SFORM, real[0].numpy())
    assert measured["faithfulness"]["real"]["hu_deviation"] == 0


def test_volumes_that_were_not_sampled_have_no_weights(tmp_path):
    item, output = case(tmp_path, "first", 6)
    engine = Engine(lambda *_: [output])
    engine.state.device = torch.device("cpu")
    ResultWriter(tmp_path / "output", None, None).attach(engine)
    engine.run([[item]])
    report = report_of(tmp_path / "output")
    assert report["weights"] is None and report["settings"] is None
    assert (tmp_path / "output" / "report.html").is_file()


def test_weights_of_elsewhere_have_no_facts(tmp_path):
    save_checkpoint(tmp_path / "model.pt", {"weight": torch.zeros(3)})
    assert report_of(run(tmp_path, [case(tmp_path, "first", 6)]))["weights"].keys() == {"file", "sha256"}


def test_each_case_leaves_its_ct_and_its_picture(tmp_path):
    cases = [case(tmp_path, "first", 6), case(tmp_path, "second", 1)]
    output = run(tmp_path, cases)
    assert {path.name for path in output.iterdir()} == {
        *("report.json", "report.html"),
        *(f"{name}_{what}" for name in ("first", "second") for what in ("ct.nii.gz", "preview.png")),
    }
    for name, (_, expected) in zip(("first", "second"), cases, strict=True):
        ct = nib.load(output / f"{name}_ct.nii.gz")
        np.testing.assert_array_equal(np.asarray(ct.dataobj), expected["pred"][0].numpy())
        np.testing.assert_array_equal(ct.affine, nib.load(tmp_path / f"{name}.nii.gz").affine)
        assert imread(output / f"{name}_preview.png").max() == 1.0


def test_a_run_that_breaks_leaves_the_cases_that_were_done(tmp_path):
    with pytest.raises(RuntimeError, match="in between"):
        run(tmp_path, [case(tmp_path, "first", 6), case(tmp_path, "second", 1)], fail_at=2)
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        *("report.json", "first_ct.nii.gz", "first_preview.png")
    }
    assert [entry["case"] for entry in report_of(tmp_path / "output")["cases"]] == ["first"]


def test_what_an_earlier_run_measured_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "output").mkdir()
    for name in ("metrics.json", "metrics.csv", "metrics.md", "organ_dice.csv"):
        (tmp_path / "output" / name).write_text("of another run")
    output = run(tmp_path, [case(tmp_path, "first", 6)])
    assert {path.name for path in output.iterdir()} == {
        *("report.json", "report.html", "first_ct.nii.gz", "first_preview.png")
    }


def test_what_later_handlers_write_at_the_end_is_in_the_page(tmp_path):
    cases = [case(tmp_path, "first", 6)]
    engine = evaluator(tmp_path, cases)
    figures = iter((123.4, 56.7))  # an evaluator may run again

    def write_metrics(engine: Engine) -> None:
        content = {"metrics": {"FID": next(figures)}, "cases": []}
        (tmp_path / "output" / "metrics.json").write_text(json.dumps(content))

    engine.add_event_handler(Events.COMPLETED, write_metrics)
    for figure in ("123.4", "56.7"):
        engine.run([[item] for item, _ in cases])
        assert f"<dt>FID</dt><dd>{figure}</dd>" in (tmp_path / "output" / "report.html").read_text()
    assert len(report_of(tmp_path / "output")["cases"]) == 1


# ------------------------------------------------------------------------------------------------- two processes

SHARES = (("b", "d"), ("a", "c", "e"))


def of_one_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    if rank == 1:
        ResultWriter._write_report = common.results.write_html = None  # the first process alone writes them
    run(folder, [case(folder, name, 1 + "abcde".index(name)) for name in SHARES[rank]])
    torch.distributed.destroy_process_group()


def without_times(report: dict) -> dict:
    cases = [{key: value for key, value in entry.items() if key != "seconds"} for entry in report["cases"]]
    return {key: value for key, value in report.items() if key != "started"} | {"cases": cases}


def test_two_processes_report_as_one(tmp_path):
    save_weights(tmp_path / "model.pt", {"weight": torch.zeros(3)}, FACTS)
    torch.multiprocessing.start_processes(of_one_process, (tmp_path,), nprocs=2, start_method="fork")
    together = (tmp_path / "output").rename(tmp_path / "together")
    alone = run(tmp_path, [case(tmp_path, name, 1 + "abcde".index(name)) for name in "ecabd"])
    assert [entry["case"] for entry in report_of(together)["cases"]] == list("abcde")
    assert without_times(report_of(together)) == without_times(report_of(alone))
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in together.iterdir()} == names
    for name in names - {"report.json", "report.html"}:
        assert (together / name).read_bytes() == (alone / name).read_bytes()


# ------------------------------------------------------------------------------------------------- checks before


def test_a_bad_case_is_found_before_the_first_is_sampled():
    class Cases:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> int:
            if i == 2:
                raise ValueError("third mask: ids outside 0...16")
            return i

    sampled = []
    engine = Engine(lambda _, batch: sampled.append(batch))
    engine.add_event_handler(Events.ITERATION_STARTED, lambda engine: sampled.append(engine.state.batch))
    CheckCases(Cases(), ResultWriter("output", None, None)).attach(engine)
    with pytest.raises(ValueError, match="third mask"):
        engine.run([0, 1])
    assert sampled == []


def test_a_case_that_can_not_be_written_is_found_before_it_is_sampled(tmp_path):
    item, _ = case(tmp_path, "first", 6)
    engine = Engine(lambda *_: pytest.fail("sampled"))
    CheckCases([item], ResultWriter("output", None, None, "dicom", keep_identity=True)).attach(engine)
    with pytest.raises(ValueError, match=r"first\.nii\.gz is no DICOM and has no identity to keep: leave out"):
        engine.run([0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output_format": "DICOM"}, "output_format is 'DICOM': choose nifti or dicom"),
        ({"output_format": "dicom", "keep_identity": "false"}, "keep_identity is 'false': write True or False"),
        ({"keep_identity": True}, "a NIfTI has no identity to keep: add --output_format dicom"),
    ],
)
def test_formats_that_do_not_go_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        ResultWriter("output", None, None, **options)
