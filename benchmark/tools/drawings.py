"""Draws the pictures of README.md and docs/idea.md into docs/drawings/, as SVG files in plain Python.

    python benchmark/tools/drawings.py            # all; competitors.svg and board.svg show what benchmark/results holds

Each drawing has a white background of its own, so that it can be read on a dark page, too. tests/test_drawings.py draws them
again and compares, and checks that no text leaves its drawing or lies on another text.
"""

import argparse
import math
import re
from pathlib import Path

from board import LEVELS, MAIN_ARMS, board_cells
from tables import grouped, natural, read_rows, write

ROOT = Path(__file__).resolve().parents[2]
INK, MUTED, GREY, RED, GRU = "#1f2328", "#57606a", "#d8dee4", "#b42318", "#f59e0b"
BLUE, ORANGE, GREEN = ("#cfe0fd", "#1d4ed8"), ("#ffedd5", "#c2410c"), ("#dcfce7", "#15803d")  # fill and edge
PADDING, WHITE = ("url(#hatch)", "#8c959f"), ("#ffffff", INK)
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>{title}</title>
<defs>
<marker id="ink" markerUnits="userSpaceOnUse" markerWidth="12" markerHeight="12" refX="9" refY="5" orient="auto">
<path d="M0 0L10 5L0 10z" fill="#1f2328"/></marker>
<marker id="blue" markerUnits="userSpaceOnUse" markerWidth="14" markerHeight="14" refX="9" refY="6" orient="auto">
<path d="M0 0L12 6L0 12z" fill="#1d4ed8"/></marker>
<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="7" height="7" fill="#f6f8fa"/><line x1="0" y1="0" x2="0" y2="7" stroke="#afb8c1" stroke-width="3"/></pattern>
</defs>
<rect x="1" y="1" width="{inner_width}" height="{inner_height}" rx="10" fill="#ffffff" stroke="#d0d7de"/>
<g font-family="Helvetica, Arial, sans-serif" fill="#1f2328">"""


class Drawing:
    """An SVG file in the making. Sizes are in units of its width, about a pixel each on a page."""

    def __init__(self, width, height, title):
        self.size = {"width": width, "height": height, "inner_width": width - 2, "inner_height": height - 2}
        self.parts, self.texts = [HEAD.format(title=title, **self.size)], []  # of a text: left, top, right, bottom, words

    def text(self, x, y, words, size=15, anchor="start", color=INK, bold=False):
        """A line of words whose middle is at height y."""
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size}" text-anchor="{anchor}"'
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text {place} fill="{color}"{weight}>{words}</text>')
        wide = size * (0.58 if bold else 0.53) * len(words)  # Arial's text is a tenth narrower
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        self.texts.append((left, y - size / 2, left + wide, y + size / 2, words))

    def box(self, x, y, width, height, look=WHITE, words="", size=15, bold=False, dash=False, round=4):
        fill, edge = look
        dashes = ' stroke-dasharray="5 4"' if dash else ""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{edge}" stroke-width="1.3"{dashes}/>')
        for i, line in enumerate(lines := words.split("\n") if words else []):
            middle = y + height / 2 + (i - (len(lines) - 1) / 2) * 1.25 * size
            self.text(x + width / 2, middle, line, size, "middle", bold=bold)

    def cells(self, x, y, words, look=WHITE, width=40, height=34, size=15):
        """A row of boxes, one for each of the words."""
        for i, word in enumerate(words):
            self.box(x + i * width, y, width, height, look, str(word), size, round=2)

    def line(self, points, color=INK, width=1.6, arrow="", dash=False):
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.path(path, color, width, arrow, dash)

    def path(self, path, color=INK, width=1.6, arrow="", dash=False):
        marker, dashes = f' marker-end="url(#{arrow})"' if arrow else "", ' stroke-dasharray="5 4"' if dash else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}"{marker}{dashes}/>')

    def arc(self, start, end, rise, color=BLUE[1], arrow="blue", width=2.4):
        """A bow from one point to another, whose top lies `rise` above them."""
        (x, y), (to_x, to_y) = start, end
        self.path(
            f"M{x:g} {y:g}C{x:g} {y - 1.33 * rise:g} {to_x:g} {to_y - 1.33 * rise:g} {to_x:g} {to_y:g}", color, width, arrow
        )

    def dot(self, x, y, color=BLUE[1], radius=4.5):
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{color}" fill-opacity="0.7"/>')

    def cross(self, x, y, reach=8):
        """Marks what is cut off."""
        for slope in (1, -1):
            self.line([(x - reach, y - slope * reach), (x + reach, y + slope * reach)], RED, 3)

    def svg(self):
        return "\n".join([*self.parts, "</g>", "</svg>", ""])


def merge():
    """Two memories of neighbouring stretches of time become one."""
    d = Drawing(800, 346, "Two memories of neighbouring stretches of time merge into one")
    d.text(400, 28, "Example: a memory that keeps the largest number it has seen", 16, "middle", bold=True)
    for x, words, look, name, kept in ((60, "3141", BLUE, "steps 1 to 4", 4), (420, "5926", ORANGE, "steps 5 to 8", 9)):
        d.cells(x, 60, words, look, 80, 38, 17)
        d.line([(x + 160, 104), (x + 160, 140)], arrow="ink")
        d.box(x + 60, 146, 200, 46, look, f"memory of {name}: {kept}")
    d.line([(220, 198), (345, 250)], arrow="ink")
    d.line([(580, 198), (455, 250)], arrow="ink")
    d.text(400, 222, "merge", 15, "middle", bold=True)
    d.box(280, 256, 240, 46, GREEN, "memory of steps 1 to 8: 9", bold=True)
    d.text(400, 324, "Whichever neighbours merge first, the result is the same.", 15, "middle", MUTED)
    return d


def scan():
    """One step after the other against a tree."""
    d = Drawing(800, 560, "A chain of seven merges that wait for each other, and a tree of three rounds")
    numbers, middles = [3, 1, 4, 1, 5, 9, 2, 6], [120 + 80 * i for i in range(8)]
    d.text(24, 26, "One step after the other: seven merges, and each waits for the one before it", 15, bold=True)
    for i, (x, n) in enumerate(zip(middles, numbers)):
        d.box(x - 20, 50, 40, 34, WHITE, str(n))
        if i:
            d.line([(x - 58, 67), (x - 24, 67)], arrow="ink")
    d.text(24, 122, "As a tree: neighbours merge at the same time, and three rounds are enough", 15, bold=True)
    levels, tops = [(numbers, middles)], [316, 252, 196, 144]
    while len(levels[-1][0]) > 1:
        held, places = levels[-1]
        levels.append(
            (
                [max(held[i : i + 2]) for i in range(0, len(held), 2)],
                [sum(places[i : i + 2]) / 2 for i in range(0, len(held), 2)],
            )
        )
    for level, ((held, places), top) in enumerate(zip(levels, tops)):
        for i, (n, x) in enumerate(zip(held, places)):
            d.box(x - 20, top, 40, 34, GREEN if level else WHITE, str(n))
            if level < 3:
                to = levels[level + 1][1][i // 2]
                d.line([(x, top), (to + (-9 if i % 2 == 0 else 9), tops[level + 1] + 38)], arrow="ink")
        if level:
            d.text(24, top + 17, f"round {level}", 14, color=MUTED)
    d.text(24, 376, "Three more rounds, back down, fill in the steps between.", 15, bold=True)
    d.text(24, 400, "Now every step has the memory of everything up to it:", 15, bold=True)
    for i, x in enumerate(middles):
        d.box(x - 20, 424, 40, 34, BLUE, str(max(numbers[: i + 1])))
        d.text(x, 474, f"step {i + 1}", 13, "middle", MUTED)
    d.text(24, 508, "1,000 steps: 999 merges in a row, or 10 rounds up and 10 down. The number of", 15)
    d.text(24, 532, "merges stays of the same size (at most twice as many); the waiting is gone.", 15)
    return d


def reset():
    """A flag where an episode begins makes the memory start anew."""
    d = Drawing(800, 330, "Two episodes on one tape: a flag makes the memory start anew")
    rows = [("observation", "314152", 40), ("first of its episode?", ["yes", "no", "no", "yes", "no", "no"], 100)]
    rows += [("memory with the reset", "334155", 166), ("memory without it", "334455", 232)]
    for name, words, top in rows:
        d.text(24, top + 19, name, 15, bold="memory" in name)
        d.cells(220, top, words[:3], BLUE, 80, 38)
        d.cells(500, top, words[3:], ORANGE, 80, 38)
    d.text(340, 22, "episode one", 14, "middle", BLUE[1])
    d.text(620, 22, "episode two", 14, "middle", ORANGE[1])
    d.line([(480, 14), (480, 284)], MUTED, 1.4, dash=True)
    d.line([(460, 251), (496, 251)], RED, 2.6)
    d.box(500, 232, 80, 38, ("none", RED), round=2)
    d.text(500, 302, "4: a number from the other episode", 14, color=RED)
    d.line([(460, 185), (473, 185)], INK, 2)
    d.cross(480, 185, 6)
    return d


def tape():
    """Whole episodes end to end, or pieces of one length: padding, and how far a gradient reaches."""
    d = Drawing(800, 420, "A tape of whole episodes, and padded segments of four steps")
    episodes = [(7, BLUE), (3, ORANGE), (6, GREEN)]
    d.text(24, 26, "Tape: three whole episodes, end to end. 16 rows, all of them data.", 15, bold=True)
    x, side = 40, 36
    for number, (steps, look) in enumerate(episodes):
        d.cells(x, 100, ["first", *[""] * (steps - 1)], look, side, 38, 13)
        d.text(x + side * steps / 2, 152, f"episode {number + 1}", 14, "middle", look[1])
        d.arc((x + side * (steps - 0.5), 96), (x + side / 2, 96), 18 + 3 * steps)
        x += side * steps
    d.text(x + 20, 70, "what a reward teaches", 14, color=BLUE[1])
    d.text(x + 20, 90, "reaches back to the", 14, color=BLUE[1])
    d.text(x + 20, 110, "first observation", 14, color=BLUE[1])
    d.line([(24, 184), (776, 184)], GREY, 1)
    d.text(24, 210, "Segments of four steps, filled up to one length. 20 rows, 4 of them padding.", 15, bold=True)
    x = 26
    for steps, look in episodes:
        for begin in range(0, steps, 4):
            here = min(4, steps - begin)
            d.cells(x, 286, (["first"] if begin == 0 else [""]) + [""] * (here - 1), look, side, 38, 13)
            d.cells(x + side * here, 286, [""] * (4 - here), PADDING, side, 38)
            d.arc((x + side * (here - 0.5), 282), (x + side / 2, 282), 30)
            if begin:
                d.cross(x - 3, 266, 7)
            x += 4 * side + 7
    d.box(26, 346, 26, 22, PADDING, round=2)
    d.text(62, 357, "padding: computed, and then thrown away", 14, color=MUTED)
    d.cross(39, 389, 7)
    d.text(62, 389, "cut: whatever came before this piece can no longer be learned from this reward", 14, color=RED)
    return d


def carried():
    """One episode over three rollouts: the carried tape, and the stored state."""
    d = Drawing(800, 520, "One episode over three rollouts: a carried tape, and a stored state")
    left, side, look = 200, 46, BLUE

    def place(step):
        return left + side * step

    d.text(24, 26, "One episode of 12 steps, collected in three rollouts of four", 15, bold=True)
    d.cells(left, 50, ["cue", *[""] * 10, "prize"], WHITE, side, 34, 13)
    for rollout in range(3):
        d.text(place(4 * rollout + 2), 98, f"rollout {rollout + 1}", 14, "middle", MUTED)
    d.line([(24, 118), (776, 118)], GREY, 1)
    d.text(24, 142, "Carried tape (here): each update sees the running episode from its first row", 15, bold=True)
    for rollout, top in enumerate((168, 214, 288)):
        d.text(24, top + 17, f"update {rollout + 1}", 15)
        d.cells(left, top, [""] * (4 * rollout), ("#f1f5ff", "#93b4f8"), side, 34)
        d.cells(place(4 * rollout), top, [""] * 4, look, side, 34)
    d.text(place(4) + 10, 186, "dark: learned from now", 14, color=MUTED)
    d.text(place(8) + 10, 232, "light: seen again", 14, color=MUTED)
    d.arc((place(11.5), 284), (place(0.5), 284), 26)
    d.line([(24, 344), (776, 344)], GREY, 1)
    d.text(24, 368, "Stored state (the usual way): only the memory's last value crosses to the next rollout", 15, bold=True)
    d.text(24, 439, "update 3", 15)
    d.box(place(3) - 20, 418, 166, 42, ORANGE, "the last value, as\nolder weights left it", 14)
    d.line([(place(7) - 10, 439), (place(8) - 5, 439)], arrow="ink")
    d.cells(place(8), 422, [""] * 4, look, side, 34)
    d.arc((place(11.5), 418), (place(8.5), 418), 24)
    d.cross(place(7.5), 418, 8)
    d.text(
        24,
        490,
        "The prize of step 12 can teach the network to keep the cue of step 1 on the carried tape only.",
        15,
        color=BLUE[1],
    )
    return d


CHOICES = [  # question, answer
    ("Must a trained agent become small C code?", "bpd_tbb_lru_continuous_action.py"),
    ("Shall a frozen network improve while it acts?", "ad_mingru.py"),
    ("Is it the optimiser that should be learned?", "optim4rl_lru.py"),
    ("Are the observations game screens?", "ppo_tbb_lru_atari_envpool.py"),
    ("Do thousands of copies explore a hard task?", "sapg_tbb_lru_continuous_action.py"),
    ("Are the actions numbers, such as torques?", "ppo_tbb_lru_continuous_action.py"),
    ("Is a step of the environment expensive?", "dqn_tbb_ffm.py"),
    ("None of these?", "ppo_tbb_lru.py"),
]


def which_file():
    """Questions from top to bottom; the first yes names the file."""
    d = Drawing(800, 30 + 54 * len(CHOICES), "Questions that lead to the file to copy")
    for i, (question, answer) in enumerate(CHOICES):
        top, last = 22 + 54 * i, i == len(CHOICES) - 1
        d.box(24, top, 370, 36, WHITE if last else ORANGE, question)
        d.line([(396, top + 18), (454, top + 18)], arrow="ink")
        if not last:
            d.text(424, top + 7, "yes", 13, "middle", MUTED)
            d.line([(120, top + 36), (120, top + 52)], arrow="ink")
            d.text(134, top + 45, "no", 13, color=MUTED)
        d.box(460, top, 316, 36, GREEN, answer, bold=True)
    return d


def panel(d, left, top, width, height, x_axis, y_axis, curves):
    """A chart. Axes: (label, ticks {value: words}, scale into 0 to 1); curves: [(colour, [(x, y)])]."""
    (x_label, x_ticks, x_at), (y_label, y_ticks, y_at) = x_axis, y_axis
    for value, words in x_ticks.items():
        x = left + width * x_at(value)
        d.line([(x, top), (x, top + height)], GREY, 1)
        d.text(x, top + height + 14, words, 13, "middle", MUTED)
    for value, words in y_ticks.items():
        y = top + height * (1 - y_at(value))
        d.line([(left, y), (left + width, y)], GREY, 1)
        d.text(left - 8, y, words, 13, "end", MUTED)
    d.text(left + width / 2, top + height + 36, x_label, 14, "middle")
    d.text(left, top - 14, y_label, 13, color=MUTED)
    for color, points in curves:
        d.line([(left + round(width * x_at(x), 1), top + round(height * (1 - y_at(y)), 1)) for x, y in points], color, 2)


def legend(d, left, top, entries):
    for i, (color, words) in enumerate(entries):
        d.line([(left, top + 22 * i), (left + 26, top + 22 * i)], color, 4)
        d.text(left + 34, top + 22 * i, words, 14)


def grid(results, name, env_id, arms):
    """Runs and curves of some arms of a grid in one environment: {arm: [(row, points)]}, seed by seed."""
    rows, _ = read_rows(results / name / "runs.csv")
    points = grouped(read_rows(results / name / "curves.csv")[0], lambda point: point["key"])
    rows = [row for row in rows if row["env_id"] == env_id and row["state"] == "done"]
    return {
        arm: [(row, points[row["key"]]) for row in sorted(rows, key=lambda r: natural(r["seed"])) if row["arm"] == arm]
        for arm in arms
    }


def competitors(results):
    """Who remembers a cue for 200 steps; and who learns first, by the clock, to recall what was some steps ago."""
    d = Drawing(840, 444, "The carried tape beside the ways that people use today: every seed")
    d.text(24, 26, "Recall a cue after 200 steps (T-maze)", 15, bold=True)
    maze = {
        "lru-carried": (BLUE[1], "memory on the carried tape"),
        "lru-stored": (ORANGE[1], "same memory, stored state"),
        "lstm-stored": ("#6e7781", "LSTM, stored state"),
    }
    runs = grid(results, "unbroken_gradient", "t_maze:TMaze-v0", maze)
    curves, entries = [], []
    for arm, (color, words) in reversed(maze.items()):
        done = runs[arm]
        curves += [(color, [(int(p["global_step"]), float(p["episodic_return"])) for p in points]) for _, points in done]
        solved = sum(float(row["greedy_return"]) >= 0.95 for row, _ in done)
        entries.insert(0, (color, f"{words}: {solved} of {len(done)} seeds solve it"))
    steps = {value * 1000: f"{value}" for value in (0, 250, 500, 750, 1000)}
    x_axis = ("thousand steps", steps, lambda x: x / 1e6)
    y_axis = ("mean return in training", {0: "0", 0.5: "0.5", 1: "1"}, lambda y: (y + 0.3) / 1.35)
    panel(d, 56, 70, 330, 230, x_axis, y_axis, curves)
    legend(d, 40, 362, entries)
    d.text(450, 26, "Recall what came four steps ago", 15, bold=True)
    race = {
        "ppo_tbb_lru": (BLUE[1], "PPO, tape (here)"),
        "dqn_tbb_lru": ("#0f9d75", "DQN, tape (here)"),
        "ppo_sbb_lstm": ("#6e7781", "PPO, LSTM (here)"),
        "sb3_recurrent_ppo": (RED, "SB3-contrib RecurrentPPO"),
    }
    runs = grid(results, "race", "popgym-RepeatPreviousEasy-v0", race)
    curves, entries = [], []
    for arm, (color, words) in race.items():
        curves += [(color, [(float(p["seconds"]), float(p["episodic_return"])) for p in points]) for _, points in runs[arm]]
        reached = [float(row["seconds_to_goal"]) for row, _ in runs[arm] if row["seconds_to_goal"]]
        lacking = "" if len(reached) == len(runs[arm]) else f" ({len(reached)} of {len(runs[arm])})"
        when = f"0.95 in {min(reached):.0f} to {max(reached):.0f} s" if reached else "never"
        entries.append((color, f"{words}: {when}{lacking}"))
    ticks = {value: f"{value}" for value in (2, 5, 10, 20, 50, 100, 200)}
    x_axis = ("seconds on one core, from the start of the process", ticks, lambda x: math.log(max(x, 2) / 2) / math.log(100))
    y_axis = ("mean return in training", {-0.5: "-0.5", 0: "0", 0.5: "0.5", 1: "1"}, lambda y: (y + 0.6) / 1.65)
    panel(d, 480, 70, 330, 230, x_axis, y_axis, curves)
    legend(d, 450, 358, entries)
    return d


def board(results):
    """POPGym's tasks at three levels: our greedy returns, each seed, beside the returns that were published."""
    folder = results / "popgym_board"
    rows, curve, published = (read_rows(folder / f"{name}.csv")[0] for name in ("runs", "curves", "reference"))
    cells = [cell for cell in board_cells(rows, curve, published) if cell["best"]]
    tasks = grouped(cells, lambda cell: cell["task"])
    minutes = [float(row["cpu_seconds"]) / 60 for row in rows if row["arm"] in MAIN_ARMS and row["state"] == "done"]
    d = Drawing(840, 350, "Return on tasks of POPGym at three levels, here and as published")
    d.text(24, 26, "POPGym: return at the end, at three levels each (Easy, Medium, Hard)", 15, bold=True)
    left, top, width, height, low = 64, 52, 760, 190, -0.55
    for value in (-0.5, 0, 0.5, 1):
        y = top + height * (1 - value) / (1 - low)
        d.line([(left, y), (left + width, y)], GREY, 1)
        d.text(left - 8, y, f"{value:g}", 13, "end", MUTED)
    step = width / len(tasks)
    for i, (task, members) in enumerate(tasks.items()):
        words = re.sub("(?<=[a-z])(?=[A-Z])(?!Pole)", " ", task.replace("PositionOnly", "").replace("Multiarmed", ""))
        for j, word in enumerate(words.split()):
            d.text(left + step * (i + 0.5), top + height + 20 + 17 * j, word, 13, "middle")
        for cell in members:
            x = left + step * (i + 0.22 + 0.28 * LEVELS.index(cell["level"]))
            heights = {name: top + height * (1 - float(cell[name])) / (1 - low) for name in ("gru", "best")}
            d.line([(x - 12, heights["gru"]), (x + 12, heights["gru"])], GRU, 4)
            d.line([(x - 12, heights["best"]), (x + 12, heights["best"])], INK, 2)
            for greedy, _ in [max(cell["arms"].values(), key=lambda arm: sum(arm[0]) / len(arm[0]))] if cell["arms"] else []:
                for value in greedy:
                    d.dot(x, round(top + height * (1 - max(value, low)) / (1 - low), 1))
    steps = [int(row["total_timesteps"]) for row in rows if row["arm"] in MAIN_ARMS and row["state"] == "done"]
    d.dot(40, 306)
    budget = f"{min(steps):,} to {max(steps):,} steps, {min(minutes):.0f} to {max(minutes):.0f} minutes of one core"
    d.text(58, 306, f"here, the better of PPO and DQN, each seed: {budget}", 14)
    d.line([(28, 330), (52, 330)], INK, 2)
    d.text(58, 330, "published: the best of 13 memories, 15 million steps", 14)
    d.line([(452, 330), (476, 330)], GRU, 4)
    d.text(482, 330, "published: GRU, 15 million steps", 14)
    return d


def draw(results):
    """{name: the drawing}"""
    drawings = {function.__name__: function() for function in (merge, scan, reset, tape, carried, which_file)}
    return drawings | {"competitors": competitors(results), "board": board(results)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "drawings", help="the folder of the drawings")
    args = parser.parse_args()
    for name, drawing in draw(ROOT / "benchmark" / "results").items():
        write(args.to / f"{name}.svg", drawing.svg())


if __name__ == "__main__":
    main()
