/** Owns the comparison itself: contestants measured in turn on the same machine, in one run. */
import type { Context } from './context.ts';
import type { Contestant, Workload } from './peers/peer.ts';
import { errorOf, type Measurement } from './rows.ts';
import type { Pair } from './statistics.ts';

/**
 * Decode throughput of `ours` and of each peer. Peers compute their prompts first, ours last, because a paused cluster
 * must go on before its work items are offered again.
 * @returns by peer its measurement, or why it has none: a peer that fails costs its own row only.
 */
export async function compareDecode(
  context: Context,
  ours: Contestant,
  peers: readonly Contestant[],
  workload: Workload,
): Promise<(Measurement | Error)[]> {
  const checks: string[] = [];
  const pairs: Pair[][] = peers.map(() => []);
  const failures = new Map<Contestant, Error>();
  const shape = `${workload.model} ${workload.numRequests} x ${workload.contextTokens}`;
  const attempt = async (peer: Contestant, work: () => Promise<void>): Promise<void> => {
    if (failures.has(peer)) return;
    await work().catch((cause: unknown) => failures.set(peer, errorOf(cause)));
  };
  try {
    for (const peer of peers) {
      context.say(`  ${shape}: prompts of ${peer.name}`);
      await attempt(peer, async () => {
        checks.push(`${peer.name}: ${(await peer.open(workload)).held}`);
      });
    }
    context.say(`  ${shape}: prompts of ${ours.name}`);
    checks.push(`${ours.name}: ${(await ours.open(workload)).held}`);
    for (let round = 0; round < context.rounds; round++) {
      for (const [i, peer] of peers.entries()) {
        await attempt(peer, async () => {
          const pair = { ours: await ours.window(context.window), peer: await peer.window(context.window) };
          pairs[i]!.push(pair);
          const [rate, peerRate] = [pair.ours.toFixed(1), pair.peer.toFixed(1)];
          context.say(`  round ${round + 1}: ${ours.name} ${rate}, ${peer.name} ${peerRate} tok/s`);
        });
      }
    }
  } finally {
    await ours.close();
    for (const peer of peers) await attempt(peer, () => peer.close());
  }
  return peers.map((peer, i) => failures.get(peer) ?? { runs: pairs[i]!, checks });
}

/** Tokens that a request may generate in all windows of `compareDecode`, with room for what comes before a pause. */
export function tokensNeeded(context: Context, numPeers: number): number {
  return 64 + context.rounds * numPeers * 4 * (context.window.minSteps + 2);
}
