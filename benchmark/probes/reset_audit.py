"""Two episodes end to end through a library's recurrent training path: what of the first reaches the second?

    python benchmark/probes/reset_audit.py      # writes benchmark/results/reset_audit

Each subject gets rows of observations: an episode of five steps, and right behind it another. Its own code computes outputs
from them as it does for an update. From these outputs come
value       do outputs in the second episode change if the first episode had other observations?
gradient    does the gradient of an output in the second episode reach an observation of the first?
reset       the row at which memory is empty, counted from the second episode's first row: 0 is right, -1 is a row early,
            1 a row late, "none" is a memory that runs on. It is looked for within two rows: a reset at row r means that no
            output from row r on has a gradient at a row before r
remembers   do outputs depend on earlier rows of their own episode? Without that, nothing was measured

training.csv has a row per library and way to use it, autoreset.csv the way of counting that many programs share: a row begins
an episode if the step before it said done. What is not installed is left out, and named.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from timing import ROOT, load_script, print_table, write_csv

LENGTH, WIDTH, ROWS = 5, 4, 14  # steps of an episode, numbers of an observation, rows that a subject sees
DQN_TAPE = "dqn_tbb_ffm", "dqn_tbb_lru", "dqn_tbb_s5", "dqn_tbb_linattn", "dqn_tbb_glru", "dqn_tbb_mingru"
DQN_SEGMENTS = "dqn_sbb_ffm", "dqn_sbb_lru", "dqn_sbb_s5", "dqn_sbb_linattn"
PPO = "ppo_tbb_ffm", "ppo_tbb_lru", "ppo_tbb_s5", "ppo_tbb_linattn", "ppo_tbb_glru", "ppo_tbb_mingru"
PPO = *PPO, "ppo_tbb_lru_continuous_action", "ppo_sbb_lstm"


class Counting(gym.Env):
    """Episodes of five steps. The observation's first number is 1 in an episode's first row; the others are noise."""

    observation_space = gym.spaces.Box(-9, 9, (WIDTH,), np.float32)

    def __init__(self, truncates=False, continuous=False, render_mode=None):
        self.truncates, self.render_mode, self.t, self.rng = truncates, render_mode, 0, np.random.default_rng(0)
        self.action_space = gym.spaces.Box(-1, 1, (1,)) if continuous else gym.spaces.Discrete(2)

    def observation(self):
        return np.array([self.t == 0, *self.rng.normal(size=WIDTH - 1)], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        ended = self.t == LENGTH
        return self.observation(), 1.0, ended and not self.truncates, ended and self.truncates, {}


def second_episode(obs):
    """The row at which the second episode begins, by the observations themselves."""
    return int(np.flatnonzero(np.asarray(obs)[:, 0] == 1)[1])


def torch_gradients(outputs, obs, weights):
    """|d (outputs[t] . weights) / d obs[s]|, summed over the observation's numbers. [T, O] -> [T, T]"""
    obs = torch.as_tensor(obs, dtype=torch.float32).clone().requires_grad_()
    rows = outputs(obs).flatten(1) @ torch.as_tensor(weights, dtype=torch.float32)
    grads = [torch.autograd.grad(row, obs, retain_graph=True)[0].abs().sum(1) for row in rows]
    return torch.stack(grads).numpy()


def jax_gradients(outputs, obs, weights):
    """The same of a function of JAX."""
    import jax
    import jax.numpy as jnp

    return np.abs(jax.jacrev(lambda x: outputs(x).reshape(len(x), -1) @ jnp.array(weights))(jnp.array(obs))).sum(-1)


def audit(outputs, obs, gradients=torch_gradients):
    """The figures of one subject: outputs(obs [T, O]) -> [T, ...], one row of outputs for each of the observations."""
    obs, convert = np.array(obs, np.float32), torch.as_tensor if gradients is torch_gradients else np.asarray
    obs = obs[: second_episode(obs) + LENGTH]  # nothing behind the second episode matters
    first = second_episode(obs)

    def values(of):
        with torch.no_grad():
            return np.asarray(outputs(convert(of))).reshape(len(of), -1)

    other = obs.copy()
    other[:first, 1:] = np.random.default_rng(1).normal(size=(first, WIDTH - 1))
    before = values(obs)
    change = np.abs(values(other) - before)
    weights = np.random.default_rng(2).normal(size=before.shape[1]).astype(np.float32)
    reach = gradients(outputs, obs, weights)
    small = 1e-6 * reach.max()  # what is not exactly zero where a mask is a factor
    resets = [r for r in range(first - 2, first + 3) if (reach[r:, :r] <= small).all()]
    return {
        "value": "yes" if change[first:].max() > 1e-6 * change[:first].max() else "no",
        "gradient": "yes" if reach[first:, :first].max() > small else "no",
        "reset": ", ".join(str(r - first) for r in resets) or "none",
        "remembers": "yes" if reach[first - 2, first - 3] > small and reach[first + 3, first + 2] > small else "no",
        "largest change of a value": float(change[first:].max()),
        "largest gradient": float(reach[first:, :first].max()),
    }


def rollout(mode=gym.vector.AutoresetMode.SAME_STEP, truncates=False, steps=ROWS):
    """(obs [T, O], dones [T]): what a program sees that says of a row that an episode begins if the step before was done."""
    envs = gym.vector.SyncVectorEnv([lambda: Counting(truncates)], autoreset_mode=mode)
    rows, dones, (obs, _), done = [], [], envs.reset(seed=0), np.ones(1, bool)
    for _ in range(steps):
        rows.append(obs[0])
        dones.append(done[0])
        obs, _, terminations, truncations, _ = envs.step(np.zeros(1, int))
        done = terminations | truncations
    return np.stack(rows), np.array(dones)


def shake(network):
    """Other weights than those of the start: small heads and gates near zero would hide what passes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return network.eval()


def script_and_spaces(name, continuous=False):
    actions = gym.spaces.Box(-1, 1, (2,)) if continuous else gym.spaces.Discrete(3)
    spaces = types.SimpleNamespace(single_observation_space=Counting.observation_space, single_action_space=actions)
    return load_script(ROOT / "single_files" / f"{name}.py"), spaces


class InOrder:
    """A generator of numbers that draws episodes or segments in their order."""

    def integers(self, high, size):
        return np.arange(size) % high


def ours_dqn(name, truncates=False):
    """A script's own buffer and network, as its loop fills and reads them: rows as `sample` hands them out."""
    script, spaces = script_and_spaces(name)
    sizes = {"segment_length": LENGTH + 2, "burn_in": 0} if "sbb" in name else {}
    buffer = getattr(script, "SegmentBuffer" if sizes else "TapeBuffer")(1000, **sizes)
    obs, _ = rollout(gym.vector.AutoresetMode.NEXT_STEP)  # its rows hold the final observations, which the buffer wants too
    for begin in (0, LENGTH + 1):
        episode = obs[begin : begin + LENGTH + 1]
        buffer.add(list(episode), [np.int64(0)] * LENGTH, [1.0] * LENGTH, not truncates)
    tape = buffer.sample(2 * (LENGTH + 2) if sizes else 2 * LENGTH, InOrder())
    network = shake(script.QNetwork(spaces, script.Args(hidden_size=16)))
    return (lambda obs: network(obs, tape.begins[: len(obs)])), tape.obs.numpy()


def ours_ppo(name):
    """A script's own carried tape and agent. Both episodes lie in one rollout, the second goes on into the next one."""
    script, spaces = script_and_spaces(name, "continuous" in name)
    agent = shake(script.Agent(spaces, script.Args(hidden_size=16)))
    obs, begins = rollout()
    tape = script.CarriedTape(np.zeros((1, 1, WIDTH), np.float32), agent.memory.initial_state(1))
    tape.add(obs[: 2 * LENGTH, None], begins[: 2 * LENGTH, None])
    sections = tape.sections([0], 2 * LENGTH)
    pad = int(sections.starts[0])

    def outputs(obs):
        policy, value, _ = agent(sections._replace(obs=torch.cat([sections.obs[:pad], obs])))
        return torch.cat([*(p.flatten(1) for p in (policy if isinstance(policy, tuple) else [policy])), value[:, None]], 1)

    return outputs, obs[: 2 * LENGTH]


def sb3_contrib(truncates=False):
    """RecurrentPPO as its users run it: its own vector environment, rollout and buffer; the minibatch that it trains on."""
    from sb3_contrib import RecurrentPPO

    model = RecurrentPPO("MlpLstmPolicy", Counting(truncates), n_steps=ROWS, batch_size=ROWS, n_epochs=1, seed=0)
    model.learn(ROWS)
    policy = shake(model.policy)
    seed = next(seed for seed in range(10_000) if np.random.RandomState(seed).randint(ROWS) == 0)
    np.random.seed(seed)  # the buffer begins its minibatch at a random row: here at the first
    batch = next(model.rollout_buffer.get(ROWS))
    place = batch.mask.flatten().nonzero().squeeze(1)  # of the rows among the padding
    later = torch.zeros(batch.lstm_states.pi[0].shape)
    later[:, 1:] = 1  # sequences whose stored state is that of the end of the episode before

    def outputs(obs):
        padded = batch.observations.index_copy(0, place[: len(obs)], obs)
        stored = [tuple(s + later * obs[0].sum().detach() for s in states) for states in batch.lstm_states]
        states = type(batch.lstm_states)(*stored)
        values = policy.evaluate_actions(padded, batch.actions[:, 0], states, batch.episode_starts)[0]
        logits = policy.get_distribution(padded, states.pi, batch.episode_starts)[0].distribution.logits
        return torch.cat([values.reshape(-1, 1), logits], 1)[place[: len(obs)]]

    return outputs, batch.observations[place].numpy()


def torchrl(kind="LSTM", init_tracker=True, backend="pad", vector=False):
    """LSTMModule or GRUModule behind InitTracker, as the module's page shows it; then in recurrent mode over the rollout."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import GymWrapper, InitTracker, TransformedEnv
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    hidden = {"LSTM": ["h", "c"], "GRU": ["h"]}[kind]
    keys = {"in_keys": ["observation", *hidden], "out_keys": ["features", *(("next", name) for name in hidden)]}
    module = {"LSTM": LSTMModule, "GRU": GRUModule}[kind]
    module = module(input_size=WIDTH, hidden_size=16, recurrent_backend=backend, **keys)
    act = TensorDictModule(lambda features: torch.zeros(*features.shape[:-1], 1), ["features"], ["action"])
    policy = TensorDictSequential(module, act)
    env = TransformedEnv(GymWrapper(Counting(continuous=True)), *([InitTracker()] if init_tracker else []))
    env = env.append_transform(module.make_tensordict_primer())
    with torch.no_grad():
        data = env.rollout(ROWS, policy, break_when_any_done=False)
    shake(module)

    def outputs(obs):
        of = data[: len(obs)].clone().set("observation", obs)
        with set_recurrent_mode(True):
            return module(of)["features"]

    return outputs, data["observation"].numpy()


def tianshou():
    """The recurrent network behind a replay buffer that stacks observations: each row is read from an empty memory."""
    from tianshou.data import Batch, ReplayBuffer
    from tianshou.utils.net.common import Recurrent

    obs, begins = rollout()
    buffer = ReplayBuffer(ROWS, stack_num=LENGTH)
    ends = np.append(begins[1:], False)
    for row, end in enumerate(ends):
        numbers = np.array([row])  # the row's number: where the buffer takes an observation from
        step = {"obs": numbers, "act": 0, "rew": 1.0, "terminated": end, "truncated": False, "obs_next": numbers, "info": {}}
        buffer.add(Batch(step))
    stacked = torch.as_tensor(buffer.get(np.arange(ROWS), "obs")).squeeze(-1)  # [T, stack] numbers of rows
    network = shake(Recurrent(layer_num=1, state_shape=WIDTH, action_shape=2, hidden_layer_size=16))
    return (lambda obs: network(obs[stacked[: len(obs)]])[0]), obs


def skrl(truncates=False, mode=gym.vector.AutoresetMode.SAME_STEP, rows=12, reads=("terminated",)):
    """PPO_RNN collects a rollout; the model sees what the agent hands it for an update, and resets by the keys in `reads`.

    The model is the user's to write. The page on recurrent models names the key "terminated", and the example for Gymnasium
    resets by it alone; the agent hands out "truncated", too. This model is of our own, with the same inputs and that rule.
    """
    from skrl import logger
    from skrl.agents.torch.ppo import PPO_CFG, PPO_RNN
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import CategoricalMixin, Model
    from skrl.trainers.torch import SequentialTrainer

    class Recurrent(CategoricalMixin, Model):
        def __init__(self, env):
            spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
            Model.__init__(self, **spaces, state_space=None, device="cpu")
            CategoricalMixin.__init__(self, unnormalized_log_prob=True)
            self.gru, self.heads = torch.nn.GRU(WIDTH, 16, batch_first=True), torch.nn.Linear(16, 2)

        def get_specification(self):
            return {"rnn": {"sequence_length": rows, "sizes": [(1, 1, 16)]}}

        def compute(self, inputs, role=""):
            obs, (state, *_) = inputs["observations"].view(1, -1, WIDTH), inputs["rnn"]
            ended = sum(inputs[name].view(-1) for name in reads) > 0 if "terminated" in inputs else [False] * obs.shape[1]
            state = state.reshape(1, -1, 1, 16)[:, 0] if self.training else state
            out = []
            for row, end in zip(obs.unbind(1), ended):
                features, state = self.gru(row[:, None], state.contiguous())
                state = state * 0 if end else state
                out.append(features[:, 0])
            return self.heads(torch.cat(out)), {"rnn": [state]}

    class Value(Recurrent):
        def act(self, inputs, role=""):
            values, outputs = self.compute(inputs, role)
            return values[:, :1], outputs

    logger.setLevel("ERROR")
    env = wrap_env(gym.vector.SyncVectorEnv([lambda: Counting(truncates)], autoreset_mode=mode))
    policy, seen = Recurrent(env), []
    agent = PPO_RNN(
        models={"policy": policy, "value": Value(env)},
        memory=RandomMemory(memory_size=rows, num_envs=1, device="cpu"),
        cfg=PPO_CFG(rollouts=rows, learning_epochs=1, mini_batches=1),
        observation_space=env.observation_space,
        state_space=None,
        action_space=env.action_space,
        device="cpu",
    )
    act = policy.act
    policy.act = lambda inputs, role="": (seen.append(inputs) if "terminated" in inputs else None) or act(inputs, role=role)
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": rows, "headless": True, "disable_progressbar": True}).train()
    shake(policy).train()
    inputs = seen[0]

    def outputs(obs):
        return policy.compute(inputs | {"observations": torch.cat([obs, inputs["observations"][len(obs) :]])})[0][: len(obs)]

    return outputs, inputs["observations"].numpy()


def cleanrl(mode=gym.vector.AutoresetMode.SAME_STEP):
    """ppo_atari_lstm.py's Agent, given its loop's `dones`: each row's is the step before's. A picture is made of each row."""
    sys.modules.setdefault("gym", gym)  # its name then; the agent itself needs no more of it
    with contextlib.redirect_stdout(io.StringIO()):
        module = importlib.import_module("cleanrl.ppo_atari_lstm")
    obs, dones = rollout(mode)
    torch.manual_seed(0)
    agent = module.Agent(types.SimpleNamespace(single_action_space=gym.spaces.Discrete(3)))
    picture, nothing = 40 * torch.randn(WIDTH, 84 * 84), torch.zeros(1, 1, 128)

    def outputs(obs):
        done = torch.as_tensor(dones[: len(obs)], dtype=torch.float32)
        return agent.get_states((obs @ picture).view(-1, 1, 84, 84), (nothing, nothing), done)[0]

    return outputs, obs


def memax(name):
    """A model of the library's quickstart, given the start flags."""
    import equinox
    import jax
    from memax.equinox.train_utils import get_residual_memory_model

    obs, begins = rollout()
    sizes = {"input": WIDTH, "hidden": 8, "output": 3, "num_layers": 2}
    model = get_residual_memory_model(model_name=name, **sizes, key=jax.random.key(0))
    run = equinox.filter_jit(lambda x, starts: model(model.initialize_carry(), (x, starts))[1])
    return (lambda x: run(x, jax.numpy.array(begins[: len(x)]))), obs


def memorax(name):
    """A sequence model, given as `mask` what the library's algorithms give it: was the step before done?"""
    import flax.linen as nn
    import jax
    from memorax.networks.sequence_models import RNN, LRUCell, Memoroid

    obs, begins = rollout()
    model = RNN(cell=nn.GRUCell(features=8)) if name == "GRU" else Memoroid(cell=LRUCell(features=WIDTH, hidden_dim=8))
    mask = jax.numpy.array(begins)[None]
    weights = model.init(jax.random.key(0), jax.numpy.array(obs)[None], mask)
    return (lambda x: model.apply(weights, jax.numpy.array(x)[None], mask[:, : len(x)])[1][0]), obs


NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP
SUBJECTS = [  # library, way of use, who shows it, subject, arguments
    *(("this project", name, "the script", ours_dqn, {"name": name}) for name in (*DQN_TAPE, *DQN_SEGMENTS)),
    *(("this project", name, "the script", ours_ppo, {"name": name}) for name in PPO),
    ("sb3-contrib", "RecurrentPPO", "its page", sb3_contrib, {}),
    ("sb3-contrib", "RecurrentPPO, episodes cut by a time limit", "its page", sb3_contrib, {"truncates": True}),
    *(
        ("torchrl", f"{kind}Module, InitTracker, {b}", "its page", torchrl, {"kind": kind, "backend": b})
        for kind in ("LSTM", "GRU")
        for b in ("pad", "scan")
    ),
    ("torchrl", "LSTMModule, no InitTracker", "nobody", torchrl, {"init_tracker": False}),
    ("tianshou", "Recurrent, buffer with stack_num", "its page", tianshou, {}),
    ("skrl", "PPO_RNN, terminated, same-step envs", "nobody", skrl, {}),
    ("skrl", "PPO_RNN, truncated, same-step envs", "nobody", skrl, {"truncates": True}),
    (
        "skrl",
        "PPO_RNN, truncated, model reads both keys",
        "nobody",
        skrl,
        {"truncates": True, "reads": ("terminated", "truncated")},
    ),
    ("skrl", "PPO_RNN, terminated, gymnasium's default envs", "its example", skrl, {"mode": NEXT_STEP}),
    ("cleanrl", "ppo_atari_lstm, same-step envs", "its page", cleanrl, {}),
    ("cleanrl", "ppo_atari_lstm, gymnasium's default envs", "nobody", cleanrl, {"mode": NEXT_STEP}),
    *(("memax", name, "its page", memax, {"name": name}) for name in ("LRU", "FFM", "GRU")),
    *(("memorax", name, "its algorithms", memorax, {"name": name}) for name in ("LRU", "GRU")),
]
JAX = "memax", "memorax"


def installed(library):
    try:
        return importlib.metadata.version("sb3_contrib" if library == "sb3-contrib" else library)
    except importlib.metadata.PackageNotFoundError:
        return None


def looked_at(libraries=None):
    """A row per subject whose library is installed; of the others nothing but the name. An error is a finding, too."""
    for library, use, shown_by, subject, arguments in SUBJECTS:
        version = "" if library == "this project" else installed(library)
        if version is None or (libraries and library not in libraries):
            continue
        row = {"library": library, "version": version, "use": use, "shown by": shown_by}
        try:
            outputs, obs = subject(**arguments)
            figures = audit(outputs, obs, jax_gradients if library in JAX else torch_gradients)
        except (KeyError, RuntimeError) as error:  # what a library answers a user who leaves something out
            figures = {"reset": "error", "error": " ".join(str(error).split())[:120]}
        yield row | figures


def envpool_rows(own):
    """[(is this an episode's first row?, did the step before say done?)] of CartPole, by envpool or by the scripts' class."""
    if own:
        script = load_script(ROOT / "single_files" / "ppo_tbb_lru_minigrid_envpool.py")
        envs = script.EnvPool("CartPole-v1", 1, lambda obs: obs, {})
        obs, _ = envs.reset(0)
    else:
        import envpool

        envs = envpool.make_gymnasium("CartPole-v1", num_envs=1, seed=0)
        obs, _ = envs.reset()
    rows, done = [], True
    for _ in range(100):
        rows.append((bool(np.abs(obs).max() <= 0.05), bool(done)))  # an episode begins this close to the middle
        obs, _, terminations, truncations, _ = envs.step(np.ones(1, int))  # always to the right: the pole falls soon
        done = (terminations | truncations)[0]
    return rows


def offset(firsts, flags):
    """Rows from the flag to the first row that it should have been at, the same at each end of an episode."""
    firsts, flags = np.flatnonzero(firsts)[1:], np.flatnonzero(flags)[1:]
    found = {int(flag - firsts[np.abs(firsts - flag).argmin()]) for flag in flags[: len(firsts)]}
    return ", ".join(map(str, sorted(found)))


def autoreset():
    """Where "a row begins an episode if the step before said done" puts the reset, by where the rows come from."""
    rows = []
    for name, mode in (("same step", gym.vector.AutoresetMode.SAME_STEP), ("next step, the default", NEXT_STEP)):
        obs, dones = rollout(mode, steps=40)
        version = importlib.metadata.version("gymnasium")
        where = {"library": "gymnasium", "version": version, "mode": name}
        rows.append(
            where | {"reset": offset(obs[:, 0] == 1, dones), "rows per episode of 5 steps": np.diff(np.flatnonzero(dones))[1]}
        )
    for own in (False, True):
        if version := installed("envpool"):
            name = "inside this project's EnvPool class" if own else "next step, all that it has"
            found = np.array(envpool_rows(own)).T
            rows.append({"library": "envpool", "version": version, "mode": name, "reset": offset(*found)})
    return rows


def parse_args():
    out = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--libraries", nargs="+", help="these alone; left out, all that are installed")
    out.add_argument("--out", default=str(ROOT / "benchmark" / "results" / "reset_audit"), help="folder of the CSV files")
    return out.parse_args()


if __name__ == "__main__":
    args = parse_args()
    where = f"torch {torch.__version__}, gymnasium {gym.__version__}, python {sys.version.split()[0]}"
    missing = sorted({library for library, *_ in SUBJECTS if library != "this project" and not installed(library)})
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    rows = list(looked_at(args.libraries))
    print_table(rows, "two episodes end to end")
    write_csv("training", where, rows, args)
    rows = autoreset()
    print_table(rows, "where `begins = the step before said done` puts the reset")
    write_csv("autoreset", where, rows, args)
