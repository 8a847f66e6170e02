#!/usr/bin/env bash
# SAPG and what it is made of, on the hill car: bash benchmark/learn/sapg.sh. SEEDS="1 2 3" chooses seeds, of 7 minutes of one
# core each; all arms of a seed run before the next seed.
source "$(dirname "$0")/grid.sh"
script=single_files/sapg_tbb_lru_continuous_action.py

arms() {
    cat <<'ARMS'
SAPG:
PPO: --num-policies 1
PPO, entropy 0.6: --num-policies 1 --ent-coef 0.6
no ladder: --entropy-scale 0
naive weights: --importance naive
clip around 1: --importance one
symmetric: --aggregation symmetric
data dropped: --aggregation none
disjoint: --sharing disjoint
disjoint, data dropped: --sharing disjoint --aggregation none
stored states: --borrowed-state stored
latent at the head: --latent-at head
KL to the leader 0.03: --follower-kl 0.03
KL to the leader 0.3: --follower-kl 0.3
one block at a time: --borrow block
all followers' rows: --off-policy-ratio 3
3-step targets: --target 3-step
ARMS
}

for seed in ${SEEDS:-1 2 3 4 5}; do
    arms | while IFS=: read -r arm flags; do
        echo "$arm: $script --env-id HillCar-v0 --seed $seed --eval-episodes 512 --checkpoint-interval 0 $flags"
    done
done | grid sapg "$@"
