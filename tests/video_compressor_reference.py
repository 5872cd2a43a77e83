"""Video compressors written out by hand: loops over frames and tokens, in float64, one formula after the other.

Every function takes lists of frames of tokens, ``tokens[f][p]`` a vector, and returns ``{place: token}``, where the
place is ``f * P + p``. Of equal candidates the earlier one wins.
"""

import math

import numpy as np


def cosine(a, b) -> float:
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def unit(a):
    norm = math.sqrt(float(a @ a))
    return a / norm if norm else a


def best(scores: dict, count: int) -> list:
    """Return the keys of the highest scores; of equal ones the smaller key."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def uniform(tokens, keep_ratio=0.25):
    total = tokens.shape[0] * tokens.shape[1]
    count = max(1, int(total * keep_ratio))
    places = [0] if count == 1 else [int(place * (total - 1) / (count - 1) + 1e-9) for place in range(count)]
    return {place: tokens[divmod(place, tokens.shape[1])] for place in places}


def evs(tokens, keep_ratio=0.25):
    num_frames, per_frame, _ = tokens.shape
    scores = {}
    for f in range(num_frames):
        for p in range(per_frame):
            scores[f * per_frame + p] = math.inf if f == 0 else 1 - cosine(tokens[f, p], tokens[f - 1, p])
    count = max(per_frame, int(num_frames * per_frame * keep_ratio))
    return {place: tokens[divmod(place, per_frame)] for place in best(scores, count)}


def vidcom2(tokens, keep_ratio=0.25):
    num_frames, per_frame, width = tokens.shape
    flat = tokens.reshape(-1, width)
    variance = {d: -float(((flat[:, d] - flat[:, d].mean()) ** 2).mean()) for d in range(width)}
    channels = sorted(best(variance, max(1, width // 2)))
    units = [[unit(tokens[f, p][channels]) for p in range(per_frame)] for f in range(num_frames)]
    frame_mean = [sum(units[f]) / per_frame for f in range(num_frames)]
    video_mean = sum(frame_mean) / num_frames

    def kernel(x, c):
        return sum(math.exp(-float((x - c) @ (x - c)) / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    g_video = [[kernel(x, video_mean) for x in units[f]] for f in range(num_frames)]
    g_frame = [[kernel(x, frame_mean[f]) for x in units[f]] for f in range(num_frames)]
    score = [-sum(g_video[f]) / per_frame for f in range(num_frames)]
    exps = [math.exp((s - max(score)) / 0.01) for s in score]
    share = [e / sum(exps) for e in exps]
    kept, likeness = set(), {}
    first = set()
    for f in range(num_frames):
        rate = min(1.0, keep_ratio * (1 + share[f] - sum(share) / num_frames))
        count = min(per_frame, max(1, round(rate * per_frame)))
        like = {f * per_frame + p: g_video[f][p] + g_frame[f][p] for p in range(per_frame)}
        chosen = sorted(like, key=lambda place, like=like: (like[place], place))[:count]
        kept |= set(chosen)
        first.add(chosen[0])
        likeness |= like
    total = max(num_frames, min(int(num_frames * per_frame * keep_ratio), num_frames * per_frame))
    while len(kept) < total:
        kept.add(min((place for place in likeness if place not in kept), key=lambda place: (likeness[place], place)))
    while len(kept) > total:
        kept.remove(max(kept - first, key=lambda place: (likeness[place], place)))
    return {place: tokens[divmod(place, per_frame)] for place in kept}


def dycoke(tokens, merge_ratio=0.7):
    num_frames, per_frame, _ = tokens.shape
    kept = {}
    for start in range(0, num_frames, 4):
        pairs = {0: None, 1: 0, 2: 0, 3: 2}
        for place, before in pairs.items():
            f = start + place
            if f >= num_frames:
                continue
            chosen = range(per_frame)
            if before is not None:
                unlike = {p: -cosine(tokens[f, p], tokens[start + before, p]) for p in range(per_frame)}
                chosen = best(unlike, int((1 - merge_ratio) * per_frame))
            kept |= {f * per_frame + p: tokens[f, p] for p in chosen}
    return kept


def visionzip(tokens, attention, keys, keep_ratio=0.25, dominant=None, contextual=None):
    num_frames, per_frame, _ = tokens.shape
    if dominant is None:
        count = max(1, int(per_frame * keep_ratio))
        contextual = count * 10 // 64
        dominant = count - contextual
    kept = {}
    for f in range(num_frames):
        chosen = best({p: attention[f, p] for p in range(per_frame)}, dominant)
        kept |= {f * per_frame + p: tokens[f, p] for p in chosen}
        rest = [p for p in range(per_frame) if p not in chosen]
        if not contextual:
            continue
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        joined = {target: [] for target in targets}
        for p in rest:
            if p not in targets:
                joined[best({target: cosine(keys[f, p], keys[f, target]) for target in targets}, 1)[0]].append(p)
        for target, members in joined.items():
            mean = sum(tokens[f, p] for p in members) / len(members) if members else 0
            kept[f * per_frame + target] = tokens[f, target] + mean
    return kept


def dtd(tokens, threshold=0.5):
    num_frames, per_frame, _ = tokens.shape
    return {
        f * per_frame + p: tokens[f, p]
        for f in range(num_frames)
        for p in range(per_frame)
        if f == 0 or not cosine(tokens[f, p], tokens[f - 1, p]) > threshold
    }


def divprune(tokens, keep_ratio=0.25, window=32):
    num_frames, per_frame, _ = tokens.shape
    total, kept, done = max(1, int(num_frames * per_frame * keep_ratio)), {}, 0
    for start in range(0, num_frames, window):
        end = min(start + window, num_frames)
        places = [f * per_frame + p for f in range(start, end) for p in range(per_frame)]
        of = {place: tokens[divmod(place, per_frame)] for place in places}
        like = {(a, b): cosine(of[a], of[b]) for a in places for b in places if a != b}
        taken = []
        for _ in range(total * end // num_frames - done):
            left = [place for place in places if place not in taken]
            largest = {
                place: -max((like[place, other] for other in taken or places if other != place), default=0)
                for place in left
            }
            taken.append(best(largest, 1)[0])
        done = total * end // num_frames
        kept |= {place: of[place] for place in taken}
    return kept


def density_peaks(points: list, k: int) -> list[int]:
    """Return the points from the best centre to the worst."""
    count = len(points)
    if count == 1:
        return [0]
    apart = [[float((a - b) @ (a - b)) for b in points] for a in points]
    density = []
    for i in range(count):
        nearest = sorted(apart[i][j] for j in range(count) if j != i)[: min(k, count - 1)]
        density.append(math.exp(-sum(nearest) / len(nearest)))
    score = {}
    for i in range(count):
        denser = [j for j in range(count) if (-density[j], j) < (-density[i], i)]
        delta = min((math.sqrt(apart[i][j]) for j in denser), default=math.sqrt(max(apart[i])))
        score[i] = density[i] * delta
    return best(score, count)


def clusters(points: list, num_clusters: int, k: int) -> dict[int, list[int]]:
    """Return the members of every centre, which is not one of them."""
    centres = density_peaks(points, k)[:num_clusters]
    members = {centre: [] for centre in sorted(centres)}
    for i, point in enumerate(points):
        if i not in members:
            apart = {centre: -float((point - points[centre]) @ (point - points[centre])) for centre in members}
            members[best(apart, 1)[0]].append(i)
    return members


def weighted(centre, members: list):
    if not members:
        return centre
    weight = max(1 / (len(members) + 1), 0.6)
    return weight * centre + (1 - weight) * sum(members) / len(members)


def fastvid(tokens, attention, keep_ratio=0.25, longest=64):
    num_frames, per_frame, _ = tokens.shape
    means = [tokens[f].mean(0) for f in range(num_frames)]
    like = {f: -cosine(means[f], means[f + 1]) for f in range(num_frames - 1)}
    cuts = {f for f in like if f in best(like, 7) or -like[f] < 0.9}
    segments, start = [], 0
    for f in range(num_frames):
        if f == num_frames - 1 or f in cuts or f - start + 1 == longest:
            segments.append(list(range(start, f + 1)))
            start = f + 1
    budget = max(1, int(per_frame * keep_ratio))
    context = int(budget * 0.4)
    kept = {}
    for segment in segments:
        anchors = [f for f in segment if (segment[-1] - f) % 4 == 0]
        others = [f for f in segment if f not in anchors]
        wanted, carried, extra = context * len(segment), {}, dict.fromkeys(others, 0)
        for place, f in enumerate(anchors):
            asked = wanted // len(anchors) + (place < wanted % len(anchors))
            carried[f] = min(asked, per_frame - (budget - context))
        left, turn = wanted - sum(carried.values()), 0
        while left:
            extra[others[turn % len(others)]] += 1
            left, turn = left - 1, turn + 1
        salient = {
            f: best({p: attention[f, p] for p in range(per_frame)}, budget - context + extra.get(f, 0))
            for f in segment
        }
        centres = {}
        for f in anchors:
            rest = [p for p in range(per_frame) if p not in salient[f]]
            order = density_peaks([tokens[f, p] for p in rest], 4) if rest else []
            for i in order[: carried[f]]:
                centres[f * per_frame + rest[i]] = []
        for f in segment:
            kept |= {f * per_frame + p: tokens[f, p] for p in salient[f]}
            for p in range(per_frame):
                place = f * per_frame + p
                if centres and p not in salient[f] and place not in centres:
                    near = {c: cosine(tokens[f, p], tokens[divmod(c, per_frame)]) for c in centres}
                    centres[best(near, 1)[0]].append(tokens[f, p])
        kept |= {c: weighted(tokens[divmod(c, per_frame)], members) for c, members in centres.items()}
    return kept


def prunevid(tokens, segment_ratio=0.25, threshold=0.8, cluster_ratio=0.5):
    num_frames, per_frame, _ = tokens.shape
    means = [tokens[f].mean(0) for f in range(num_frames)]
    members = clusters(means, max(1, int(num_frames * segment_ratio)), 7)
    cluster_of = {i: centre for centre, some in members.items() for i in [centre, *some]}
    kept = {}

    def reduce(places: list[int], points: list) -> None:
        if len(points) <= 14:
            kept.update(dict(zip(places, points, strict=True)))
            return
        for centre, some in clusters(points, max(1, int(len(points) * cluster_ratio)), 7).items():
            kept[places[centre]] = sum(points[i] for i in [centre, *some]) / (1 + len(some))

    start = 0
    for end in range(1, num_frames + 1):
        if end < num_frames and cluster_of[end] == cluster_of[start]:
            continue
        segment = range(start, end)
        static = []
        for p in range(per_frame):
            pairs = [cosine(tokens[a, p], tokens[b, p]) for a in segment for b in segment if a < b]
            if pairs and sum(pairs) / len(pairs) > threshold:
                static.append(p)
        reduce([start * per_frame + p for p in static], [tokens[start:end, p].mean(0) for p in static])
        for f in segment:
            moving = [p for p in range(per_frame) if p not in static]
            reduce([f * per_frame + p for p in moving], [tokens[f, p] for p in moving])
        start = end
    return kept


def holitom(tokens, attention, keep_ratio=0.25, threshold=None):
    num_frames, per_frame, _ = tokens.shape
    if threshold is None:
        threshold = 0.65 if keep_ratio <= 0.1 else 0.8
    alike = [
        [cosine(tokens[f, p], tokens[f + 1, p]) > threshold for p in range(per_frame)] for f in range(num_frames - 1)
    ]

    def static_of(start: int, end: int) -> list[int]:
        if end - start == 1:
            return []
        return [p for p in range(per_frame) if all(alike[f][p] for f in range(start, end - 1))]

    most, cut = {0: 0}, {0: []}
    for end in range(1, num_frames + 1):
        for start in reversed(range(end)):  # the shortest last segment first
            saved = most[start] + len(static_of(start, end)) * (end - start - 1)
            if end not in most or saved > most[end]:
                most[end], cut[end] = saved, [*cut[start], (start, end)]
    total = num_frames * per_frame
    ratio = min(keep_ratio / (1 - most[num_frames] / total), 1.0)
    kept = {}
    for start, end in cut[num_frames]:
        static = static_of(start, end)
        points = [tokens[start:end, p].mean(0) for p in static]
        if int(len(static) * ratio):
            for centre, some in clusters(points, int(len(static) * ratio), 7).items():
                kept[start * per_frame + static[centre]] = weighted(points[centre], [points[i] for i in some])
        moving = [p for p in range(per_frame) if p not in static]
        for f in range(start, end):
            chosen = best({p: attention[f, p] for p in moving}, int(len(moving) * ratio))
            kept |= {f * per_frame + p: tokens[f, p] for p in chosen}
    if not kept:
        place = best({i: attention[divmod(i, per_frame)] for i in range(total)}, 1)[0]
        kept[place] = tokens[divmod(place, per_frame)]
    return kept


def as_arrays(kept: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the places in order, and the tokens."""
    places = sorted(kept)
    return np.array(places), np.stack([kept[place] for place in places])
