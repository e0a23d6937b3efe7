"""`wanmoe bench ring` on the CPU: what it measures of the tiny model, beside what is planned."""

import json
from dataclasses import replace

from typer.testing import CliRunner

from wanmoe.launch import bench_ring
from wanmoe.launch.cli import app
from wanmoe.train.planner import GB, Planner, card_of


def test_every_row_is_measured_beside_its_plan(tmp_path):
    found = CliRunner().invoke(app, ["bench", "ring", "--out", str(tmp_path), "--device", "cpu"])
    assert found.exit_code == 0, found.output
    (path,) = (tmp_path / "ring").glob("ring-*.json")
    result = json.loads(path.read_text())
    assert result["format"] == bench_ring.FORMAT and result["provenance"]["gpu"] is None
    rows = result["rows"]
    assert [(row["kind"], row["stream"]) for row in rows] == [
        *(("training", 0), ("training", 6)),
        *(("generation", 0), ("generation", 6)),
    ]
    for row in rows:
        assert row["seconds"] > 0 and row["planned_seconds"] > 0 and len(row["all_seconds"]) == 4
        assert (row["copied"] > 0) == (row["stream"] > 0) and row["peak"] is None
    # Each of six streamed blocks comes once, those of the tail twice but for what the slots still hold; what
    # was brought ahead for a model gives way to the other.
    assert 6 <= rows[1]["blocks_copied"] <= 8 and 6 <= rows[3]["blocks_copied"] <= 8
    assert found.output.count("| training |") == found.output.count("| generation |") == 2


def test_what_streams_on_a_card_is_what_fits_under_its_limit():
    job = bench_ring.Job(
        "t2v-A14B",
        bench_ring.WanConfig.preset("t2v-A14B"),
        2,
        bench_ring.AdapterConfig(),
        ("base", "experts"),
        (21, 32, 32),
    )
    planner = Planner(job, card_of("h100-80g"))
    (resident, no_limit), (ring, cap) = bench_ring._settings(planner, bench_ring.GPU, 24)
    assert (resident.stream, no_limit, cap) == (0, 0.0, 24)
    assert planner.needs(ring).peak <= 24 * GB < planner.needs(replace(ring, stream=ring.stream - 1)).peak
    smaller = Planner(job, card_of("40GB"))
    assert [one.stream > 0 for one, _ in bench_ring._settings(smaller, bench_ring.GPU, 24)] == [True]
