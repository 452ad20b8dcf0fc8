"""Learn to balance a pole without seeing velocities: PPO with a recurrent CfC policy.

The policy sees only the cart's position and the pole's angle, so it has to remember them to know
how fast they move. It acts by `step`, one call for all 32 environments, and learns from whole
episodes of different lengths by one call of the layer. Takes half a minute on two cores.

pip install ".[examples]"  # brings gymnasium
python scripts/examples/policy.py
"""

import argparse

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from ember_ext.nn import CfC


class Policy(nn.Module):
    """A recurrent layer on position and angle, and what reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = CfC(2, 32, backbone_units=64), nn.Linear(32, 3)

    def read_out(self, y: Tensor) -> tuple[Categorical, Tensor]:
        """What the layer says, [..., 32], as a choice of two actions and a value, [...]."""
        logits, value = self.head(y).split((2, 1), -1)
        return Categorical(logits=logits), value.squeeze(-1)


@torch.no_grad()
def play(envs: gymnasium.vector.VectorEnv, policy: Policy, memory: float = 1.0) -> list[Tensor]:
    """An episode of each environment: what it saw [B, T, 2], what it did [B, T], how long [B]."""
    seen, _ = envs.reset(seed=int(torch.randint(2**31, ())))
    playing, lengths = torch.ones(envs.num_envs, dtype=torch.bool), torch.zeros(envs.num_envs)
    history, h = [], torch.zeros(envs.num_envs, 32)
    while playing.any():
        x = torch.from_numpy(seen[:, ::2]) * torch.tensor([1.0, 10.0])  # to similar sizes
        y, h = policy.rnn.step(x, memory * h)
        history.append((x, policy.read_out(y)[0].sample()))
        lengths += playing
        seen, _, fell, time_is_up, _ = envs.step(history[-1][1].numpy())
        playing &= ~torch.from_numpy(fell | time_is_up)
    return [*(torch.stack(part, 1) for part in zip(*history, strict=True)), lengths]


def learn(policy: Policy, optimizer: torch.optim.Optimizer, episodes: list[Tensor]) -> None:
    """Four steps of proximal policy optimisation."""
    x, actions, lengths = episodes
    left = lengths[:, None] - torch.arange(x.shape[1])  # steps to go, with a reward of 1 each
    real, returns, old = left > 0, 1 - 0.98**left, None
    for _ in range(4):
        choice, value = policy.read_out(policy.rnn(x, lengths=lengths.long())[0])
        log_p, error = choice.log_prob(actions)[real], (returns - value)[real]
        old = log_p.detach() if old is None else old
        ratio, gain = (log_p - old).exp(), (error - error.mean()).detach() / error.detach().std()
        gain = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        optimizer.zero_grad()
        (error.square().mean() - gain.mean() - 0.01 * choice.entropy()[real].mean()).backward()
        optimizer.step()


parser = argparse.ArgumentParser(description="Balance a pole without seeing velocities.")
parser.add_argument("--updates", type=int, default=50, help="rounds of play (default: 50)")
torch.set_num_threads(1)  # a step is too little work for two
torch.manual_seed(0)
envs = gymnasium.make_vec("CartPole-v1", 32, vectorization_mode="vector_entry_point")
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
for update in range(parser.parse_args().updates):
    episodes = play(envs, policy)
    if update % 10 == 0:
        print(f"{f'update {update}':24}{episodes[-1].mean():5.0f} of 500 steps")
    learn(policy, optimizer, episodes)
for name, memory in (("after training", 1.0), ("the same without memory", 0.0)):
    print(f"{name:24}{play(envs, policy, memory)[-1].mean():5.0f} of 500 steps")
