#!/usr/bin/env bash
# Atari on a tape and in segments of 80 steps, at equal rows per update: docs/envpool.md. bash benchmark/learn/atari_segments.sh
# All runs with seed 1 come first, then those with seed 2 and seed 3. About 110 minutes on one core.
WORKERS=${WORKERS:-1}
source "$(dirname "$0")/grid.sh"
# the learning rate stays: a run this short ends where a longer one begins to learn Pong
flags="--cnn-channels 16 --train-frequency 64 --no-anneal-lr --max-episode-steps 5000 --checkpoint-interval 0"

# A tape goes on to the end of its last episode: one game of Pong has 900 steps at first and more later, a life of Ms. Pac-Man
# about 160. So a tape has more rows than --batch-size says, and segments get a batch size with which they have as many.
runs() { # flags of a game, batch size of the tape, batch size of the segments
    echo "tape: single_files/dqn_tbb_lru_atari_envpool.py $1 $flags --batch-size $2 --seed $seed"
    echo "segments of 80: single_files/dqn_sbb_lru_atari_envpool.py $1 $flags --batch-size $3 --segment-length 80 --seed $seed"
}

for seed in 1 2 3; do
    runs "--env-id MsPacman-v5 --episodic-life --total-timesteps 120000" 450 560
    [ $seed = 3 ] || runs "--env-id Pong-v5 --total-timesteps 150000" 500 1000 # twice as dear
done | grid atari_segments "$@"
