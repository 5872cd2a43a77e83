"""Every form of row that the documentation shows is read as it says, and nothing else passes in silence."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_mixture import LLAVA, TALK, TALK_M, parts, record

from hico.data.forms import Media
from hico.data.media import read_media
from hico.data.rowfiles import Blob

DOCUMENT = (Path(__file__).parents[1] / "docs/data.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(\{.+\})` \|$", DOCUMENT.partition("## Preference rows")[0], flags=re.MULTILINE)
CAT = [Media("video", "cat.mp4")]
PART = [Media("video", "cat.mp4", 60.0, 90.5)]
SKY = [Media("image", "a.png")]
EXPECTED = [
    *(CAT, CAT, [Media("image", "a.png"), Media("image", "b.png")], CAT, SKY, [], [], []),
    *(PART, PART, [Media("video", "cat.mp4", 60.0, 90.0)], [Media("video", "cat.mp4", num_frames=16)]),
    *([Media("video", "cat.mp4", fps=2.0)], CAT, [Media("video", "frames/cat")]),
    [Media("video", ("1.jpg", "2.jpg", "3.jpg"))],
    [Media("video", ("a/1.jpg", "a/2.jpg")), Media("video", ("b/1.jpg", "b/2.jpg"))],
    [],
]


@pytest.mark.parametrize(("number", "what"), enumerate(what for what, _ in ROWS))
def test_the_documented_forms_are_read(tmp_path, number, what):
    found = record(json.loads(ROWS[number][1]), tmp_path)
    assert len(ROWS) == len(EXPECTED)
    assert found.media == EXPECTED[number]
    assert found.messages[-1]["role"] == "assistant"
    if "system" in what:
        assert found.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    if "not learned" in what:
        assert [turn.get("loss", True) for turn in found.messages] == [True, False, True, True]
    if "how long" in what:
        assert found.duration == 93.4


def clip(**keys):
    return parts({"type": "video", "video": "a.mp4", **keys})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LLAVA, "vidoe_start": 3}, "the key 'vidoe_start', which means nothing here; did you mean 'video_start'"),
        (
            {**LLAVA, "mood": "good"},
            "the key 'mood', which means nothing here; if it is a note, name it in other_keys",
        ),
        ({**LLAVA, "audios": ["a.mp3"]}, "the key 'audios'"),
        ({"messages": [TALK_M[0], {**TALK_M[1], "tool_calls": [1]}]}, "a turn has the key 'tool_calls'"),
        ({"conversations": [TALK[0], {**TALK[1], "lose": 0}]}, "a turn has the key 'lose'.*did you mean 'loss'"),
        (clip(max_pixels=3), "a part of type 'video' has the key 'max_pixels'"),
        (parts({"type": "text", "text": "x", "bold": True}), "a text part has the key 'bold'"),
        (parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}), "the key 'detail'"),
        (parts({"type": "image", "image": "a.png", "fps": 2}), "fps is 2, but an image has no time"),
        ({**LLAVA, "video": "a\n.mp4"}, "holds a control character"),
        ({**LLAVA, "video": ["a.mp4", "\0"]}, "holds a control character"),
        (clip(fps=0), "fps 0.0 say nothing"),
        (clip(num_frames=2.5), "num_frames 2.5"),
        (clip(num_frames=4, nframes=5), "num_frames and nframes contradict each other"),
        (clip(num_frames=4, fps=2), "num_frames 4.0 and fps 2.0"),
        (clip(start=1, video_start=2), "start and video_start contradict each other"),
        (clip(clip=[1]), r"clip is \[1\]; give \[start, end\]"),
        (clip(clip=[3, 1]), "do not bound a clip"),
        ({"conversations": TALK, "fps": 2}, "fps is 2, but it names no 'video'"),
        ({"messages": [{**TALK_M[0], "loss": True}, TALK_M[1]]}, "'loss' of a user turn is True"),
        ({"messages": [TALK_M[0], {**TALK_M[1], "weight": 0.5}]}, "'weight' of a assistant turn is 0.5"),
        ({"messages": [TALK_M[0], {**TALK_M[1], "loss": False}]}, "'loss' is false for every answer"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, *TALK_M]}, "or there are two"),
        ({"system": 3, "messages": TALK_M}, "'system' is 3; it must be text"),
        (parts({"type": "image", "image": "data:image/png;base64,?"}), "which is not base64"),
    ],
)
def test_a_key_without_a_meaning_is_an_error_with_its_place(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"malformed row at .*rows\.json:2: .*{message}"):
        record(row, tmp_path)


def test_empty_keys_and_named_notes_mean_nothing(tmp_path):
    row = {**LLAVA, "audios": [], "tools": None, "start": None, "image": "", "system": "", "mood": "good"}
    assert record(row, tmp_path, other_keys=["mood"]).media == [Media("video", "a.mp4")]


def test_images_may_stand_in_the_row_itself(tmp_path):
    Image.new("RGB", (3, 2), (9, 8, 7)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    (image,) = record(parts({"type": "image_url", "image_url": {"url": url}}), tmp_path).media
    assert isinstance(image.source, Blob)
    (picture,) = read_media([image], 0, {}, settings={})
    assert picture.getpixel((0, 0)) == (9, 8, 7)


@pytest.fixture
def frames(tmp_path):
    names = [str(tmp_path / f"{number}.png") for number in (2, 10, 1, 7)]  # the order is the row's
    for shade, name in enumerate(names):
        Image.new("RGB", (8, 8), (50 * shade,) * 3).save(name)
    return tuple(names)


def test_frames_named_one_by_one_are_a_video_in_their_order(frames):
    settings = {"mode": "middle", "num_frames": 4, "clip_len": 4, "size": 8}
    (video,) = read_media([Media("video", frames)], 0, {"folder_fps": 2.0}, settings=settings)
    assert video.frames[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    assert video.seconds.tolist() == [0.0, 0.5, 1.0, 1.5]
    (video,) = read_media([Media("video", frames, start=1.0)], 0, {"folder_fps": 1.0}, settings=settings)
    assert np.unique(video.frames).tolist() == [50, 100, 150]


def test_a_broken_frame_names_the_row_and_no_other_folder(frames):
    Path(frames[0]).write_text("no picture")
    with pytest.raises(ValueError, match=re.escape(frames[0])):
        read_media([Media("video", frames)], 0, {}, settings={"num_frames": 4})


@pytest.mark.parametrize(
    ("item", "settings", "expected"),
    [
        (Media("video", "v", num_frames=2), {"mode": "dynamic_fps1", "min_frames": 4, "max_frames": 8}, 2),
        (Media("video", "v", fps=2.0), {"mode": "dynamic_fps1", "min_frames": 1, "max_frames": 8}, 8),
        (Media("video", "v", fps=2.0), {"mode": "dynamic_fps1", "min_frames": 1, "max_frames": 4}, 4),
        (Media("video", "v", fps=1.0), {"mode": "middle", "num_frames": 3}, 3),
    ],
)
def test_what_a_row_says_about_frames_comes_first(frames, item, settings, expected):
    item = Media("video", frames, num_frames=item.num_frames, fps=item.fps)
    (video,) = read_media([item], 0, {"folder_fps": 1.0}, settings={"clip_len": 1, **settings})
    assert len(video.frames) == min(expected, 4)
