"""Every video compressor against its formula, written out by hand in `video_compressor_reference`."""

import inspect

import pytest
import torch
import video_compressor_reference as reference
from test_video_compressors import build, video_of, wide

from hico.ops.clustering import dpc_knn, peak_order, squared_distances
from hico.registry import VIDEO_COMPRESSORS
from hico.video_compressors.holitom import best_segments

CASES = {
    "uniform": [{}, {"keep_ratio": 0.07}],
    "evs": [{}, {"keep_ratio": 0.5}, {"keep_ratio": 0.01}],
    "vidcom2": [{}, {"keep_ratio": 0.1}, {"keep_ratio": 0.6}],
    "dycoke": [{}, {"merge_ratio": 0.4}],
    "visionzip": [{}, {"keep_ratio": 0.7}, {"dominant": 2, "contextual": 3}, {"dominant": 0, "contextual": 2}],
    "divprune": [{}, {"keep_ratio": 0.2, "window": 4}],
    "dtd": [{}, {"threshold": 0.25}, {"threshold": 0.9}],
    "fastvid": [{}, {"keep_ratio": 0.6}, {"keep_ratio": 0.8, "longest": 3}],
    "prunevid": [{}, {"threshold": 0.5, "cluster_ratio": 0.25}, {"segment_ratio": 0.1, "threshold": -1.0}],
    "holitom": [{}, {"keep_ratio": 0.1}, {"keep_ratio": 0.5, "threshold": 0.6}],
}
SHAPES = [(13, 16), (1, 18), (6, 2)]


def test_every_method_but_chance_has_its_formula():
    assert {*CASES, "random"} == {*VIDEO_COMPRESSORS.names()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "settings"), [(name, case) for name, some in CASES.items() for case in some])
def test_it_keeps_what_its_formula_keeps(name, settings, shape):
    for seed in (1, 2) if shape[0] > 1 else (1,):
        video = wide(video_of(*shape, seed=seed))
        if sum(settings.get(key, 0) for key in ("dominant", "contextual")) > shape[1]:
            with pytest.raises(ValueError, match="cannot keep 2 dominant and 3 contextual tokens of the 2 of a frame"):
                build(name, **settings).select(*video)
            continue
        formula = getattr(reference, name)
        given = dict(zip(("attention", "keys"), (part.numpy() for part in video[1:]), strict=True))
        given = {key: part for key, part in given.items() if key in inspect.signature(formula).parameters}
        places, tokens = reference.as_arrays(formula(video.tokens_FPD.numpy(), **given, **settings))
        indices, found = build(name, **settings).select(*video)
        assert indices.tolist() == places.tolist()
        torch.testing.assert_close(found, torch.from_numpy(tokens), rtol=1e-5, atol=1e-6)
        narrow = build(name, **settings).select(*video_of(*shape, seed=seed))
        assert narrow[0].tolist() == places.tolist()


def test_density_peaks_are_those_of_the_formula():
    points = torch.randn(3, 20, 5, dtype=torch.float64)
    order = peak_order(squared_distances(points), k=4)
    assert order.tolist() == [reference.density_peaks(list(group.numpy()), 4) for group in points]
    centres, groups = dpc_knn(points, 6, k=4)
    for number, group in enumerate(points):
        members = reference.clusters(list(group.numpy()), 6, 4)
        assert centres[number].tolist() == list(members)
        for place, (centre, some) in enumerate(members.items()):
            assert sorted([centre, *some]) == (groups[number] == place).nonzero()[:, 0].tolist()


def test_density_peaks_work_where_densities_vanish_and_where_all_points_are_equal():
    far = torch.randn(1, 12, 4) * 1e4
    assert sorted(peak_order(squared_distances(far), k=3)[0].tolist()) == list(range(12))
    near = peak_order(squared_distances(far * 1e-4), k=3)
    assert near[0, 0] != 0 or near.unique().numel() == 12
    centres, groups = dpc_knn(torch.ones(1, 6, 4), 3, k=2)
    assert centres.tolist() == [[0, 1, 2]]
    assert groups.tolist() == [[0, 1, 2, 0, 0, 0]]


def test_segments_save_as_much_as_any_segmentation_could():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        alike = (torch.rand(6, 5, generator=generator) < 0.7).numpy()

        def saved(segments, alike=alike):
            return sum(alike[a : b - 1].all(0).sum() * (b - a - 1) for a, b in segments if b - a > 1)

        def all_of(start, num_frames=7):
            if start == num_frames:
                yield []
            for end in range(start + 1, num_frames + 1):
                for rest in all_of(end):
                    yield [(start, end), *rest]

        found = best_segments(alike)
        assert [a for a, _ in found] == [0, *[b for _, b in found[:-1]]]
        assert saved(found) == max(map(saved, all_of(0)))
