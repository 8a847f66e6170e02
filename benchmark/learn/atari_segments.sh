#!/usr/bin/env bash
# Atari on a tape and in segments of 80 steps, at equal rows per update: docs/envpool.md. bash benchmark/learn/atari_segments.sh
# About 60 minutes on one fast core, 110 on a slower one.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"
flags="--cnn-channels 16 --train-frequency 64"
# Ms. Pac-Man keeps its learning rate: a run of a sixteenth of the usual length would anneal it sooner than it learns
pacman="--env-id MsPacman-v5 --episodic-life --total-timesteps 120000 $flags --no-anneal-lr --max-episode-steps 5000"
pong="--env-id Pong-v5 --total-timesteps 150000 $flags" # a game of it is twice as dear

# A tape goes on to the end of its last episode: one game of Pong has 900 steps at first and more later, a life of Ms. Pac-Man
# about 160. So a tape has more rows than --batch-size says, and segments get a batch size with which they have as many.
runs() { # flags of a game, batch size of the tape, batch size of the segments
    echo "tape: single_files/dqn_tbb_lru_atari_envpool.py $1 --checkpoint-interval 0 --batch-size $2 --seed $seed"
    echo "segments of 80: single_files/dqn_sbb_lru_atari_envpool.py $1 --checkpoint-interval 0 --batch-size $3 --segment-length 80 --seed $seed"
}

for seed in 1 2 3; do
    runs "$pacman" 450 560
    runs "$pong" 500 1000
done | grid atari_segments "$@"
