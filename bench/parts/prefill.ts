/** Owns the rows of prefill: prompt tokens per second, from the first prompt given to the last first token. */
import type { Context } from '../context.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import type { Contestant, Workload } from '../peers/peer.ts';
import { RemotePeer } from '../peers/remote.ts';
import { measured, type Row } from '../rows.ts';
import type { Pair } from '../statistics.ts';

async function promptRate(contestant: Contestant, workload: Workload, checks: string[]): Promise<number> {
  try {
    const { promptTokensPerSecond, held } = await contestant.open(workload);
    if (promptTokensPerSecond === null) throw new Error(`${contestant.name} computes no prompts`);
    checks.push(`${contestant.name}: ${held}`);
    return promptTokensPerSecond;
  } finally {
    await contestant.close();
  }
}

export async function prefill(context: Context): Promise<Row[]> {
  const ours = new LaminaPeer();
  const peer = new RemotePeer('llama-cpp');
  const rows: Row[] = [];
  const cases = context.isQuick
    ? [{ numRequests: 1, contextTokens: 512 }]
    : [1, 8].map((numRequests) => ({ numRequests, contextTokens: 1024 }));
  try {
    for (const { numRequests, contextTokens } of cases) {
      const name = {
        part: 'prefill',
        name: `smollm2-135m ${numRequests} x ${contextTokens}`,
        unit: 'prompt tok/s',
        peerName: peer.name,
        mustReach: 1,
      };
      const { threads, directory } = context;
      const workload = { model: 'smollm2-135m', numRequests, contextTokens, maxNewTokens: 64, threads, directory };
      rows.push(
        await measured(name, async () => {
          const checks: string[] = [];
          const runs: Pair[] = [];
          // The first round warms both up.
          for (let round = 0; round <= Math.min(context.rounds, 3); round++) {
            const pair = {
              ours: await promptRate(ours, workload, checks),
              peer: await promptRate(peer, workload, checks),
            };
            context.say(`  round ${round}: lamina ${pair.ours.toFixed(0)}, ${peer.name} ${pair.peer.toFixed(0)} tok/s`);
            if (round > 0) runs.push(pair);
          }
          return { runs, checks };
        }),
      );
    }
    return rows;
  } finally {
    await ours.dispose();
    await peer.dispose();
  }
}
