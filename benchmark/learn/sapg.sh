#!/usr/bin/env bash
# SAPG and what it is made of, on the hill car; whose memory should read borrowed rows, on the one with a cue; how costs grow with
# the number of environments; HalfCheetah: bash benchmark/learn/sapg.sh. SEEDS="1 2 3" chooses seeds of the first two, of 8 and 2
# minutes of one core each; all arms of a seed run before the next seed.
source "$(dirname "$0")/grid.sh"
script=single_files/sapg_tbb_lru_continuous_action.py

line() { # an arm, flags of all arms, and its own, which may begin with a script of its own
    case $3 in
    *.py*) echo "$1:$3 $2" ;;
    *) echo "$1: $script $2$3" ;;
    esac
}

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
disjoint: single_files/sapg_disjoint_tbb_lru_continuous_action.py
disjoint, data dropped: single_files/sapg_disjoint_tbb_lru_continuous_action.py --aggregation none
stored states: --borrowed-state stored
latent at the head: --latent-at head
KL to the leader 0.03: --follower-kl 0.03
KL to the leader 0.3: --follower-kl 0.3
one block at a time: --borrow block
all followers' rows: --off-policy-ratio 3
lambda 0.95: --borrowed-lambda 0.95
3-step targets: benchmark/probes/ablate.py n_step=3 single_files/sapg_tbb_lru_continuous_action.py
ARMS
}

for seed in ${SEEDS:-1 2 3 4 5}; do
    arms | while IFS=: read -r arm flags; do
        line "$arm" "--env-id HillCar-v0 --seed $seed --eval-episodes 512 --checkpoint-interval 0" "$flags"
    done
done | grid sapg "$@"

for seed in $(seq 6 20); do # how often PPO finds the hill by luck: it or never, so more seeds
    echo "PPO: $script --env-id HillCar-v0 --seed $seed --eval-episodes 512 --checkpoint-interval 0 --num-policies 1"
done | grid sapg_luck "$@"

cue() {
    cat <<'ARMS'
SAPG:
stored states: --borrowed-state stored
data dropped: --aggregation none
PPO: --num-policies 1
disjoint: single_files/sapg_disjoint_tbb_lru_continuous_action.py
disjoint, stored states: single_files/sapg_disjoint_tbb_lru_continuous_action.py --borrowed-state stored
ARMS
}

for seed in ${SEEDS:-1 2 3 4 5 6 7 8 9 10}; do
    cue | while IFS=: read -r arm flags; do # from the sixth on: the pair that asks whose memory reads a borrowed row
        case $seed:$arm in [1-5]:* | *:disjoint*) ;; *) continue ;; esac
        all="--env-id HillCarCue-v0 --seed $seed --total-timesteps 1507328 --eval-episodes 512 --checkpoint-interval 0"
        line "$arm" "$all" "$flags"
    done
done | grid sapg_cue "$@"

for seed in 1 2 3; do # the steps of 60 rollouts at 1,024 environments
    for envs in 256 4096; do
        for arm in "PPO:--num-policies 1" SAPG:; do
            echo "${arm%%:*}, $envs environments: $script --env-id HillCar-v0 --seed $seed --eval-episodes 512 --num-envs $envs" \
                "--checkpoint-interval 0 ${arm#*:}"
        done
    done
done | grid sapg_envs "$@"

# Where SAPG is not needed, it must not hurt: 64 copies of HalfCheetah, with rewards scaled, and a ladder that suits them
cheetah="--env-id HalfCheetah-v5 --num-envs 64 --num-steps 128 --max-prefix 128 --total-timesteps 600000 --learning-rate 1e-3"
cheetah="$cheetah --hidden-size 64 --state-size 32 --norm-reward --anneal-lr --std-min 0.05 --eval-episodes 20"
held="--num-policies 2 --entropy-scale 0.005 --follower-kl 1 --borrowed-lambda 0.95 --latent-at head" # two, all but one
for seed in 1 2 3; do
    for arm in "PPO:--num-policies 1" "SAPG:--entropy-scale 0.005" "SAPG, KL to the leader 0.1:--entropy-scale 0.005 --follower-kl 0.1" \
        "SAPG, no ladder:--entropy-scale 0" "SAPG, lambda 0.95:--entropy-scale 0.005 --borrowed-lambda 0.95" \
        "SAPG, KL to the leader 0.1, lambda 0.95:--entropy-scale 0.005 --follower-kl 0.1 --borrowed-lambda 0.95" \
        "PPO, 8 minibatches:--num-policies 1 --num-minibatches 8" \
        "SAPG, 8 minibatches, 2 policies:$held --num-minibatches 8"; do
        echo "${arm%%:*}: $script --seed $seed $cheetah --checkpoint-interval 0 ${arm#*:}"
    done
done | grid sapg_cheetah "$@"
