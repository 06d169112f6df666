/**
 * Owns the rows of scale: attention of 1, 2, 4 and 8 shards, each in a container with a CPU quota, against as many times one;
 * and, for what the machine's memory lets through, against as many bare kernels under the same quota.
 *
 * Invariants
 * 1. The quota is set when KV is written, so that the preparation does not take ten times as long; it holds in all that is
 *    measured.
 * 2. Containers are removed whatever happens. They run this checkout, mounted read-only, on the host's network.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { processEnvironment } from '@lamina/runtime';
import { blockBytes } from '@lamina/tensor';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { AttentionDriver } from '../attention-driver.ts';
import type { Context } from '../context.ts';
import { shapeOf } from '../models.ts';
import { output, sleep } from '../processes.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';
import { SCALE, scaleLayoutOf } from '../scale-shape.ts';
import type { Pair } from '../statistics.ts';

const QUOTA_CPUS = '0.15';
/** Numbers of shards, and what they must reach of linear. */
const CASES = [
  { numShards: 2, mustReach: null },
  { numShards: 4, mustReach: 0.85 },
  { numShards: 8, mustReach: 0.75 },
] as const;
const MOST_SHARDS = 8;
const MAX_PAYLOAD_BYTES = 8 * 1024 * 1024;
const OFFLINE_IMAGE = 'lamina-offline/node:local';
const DEFAULT_IMAGE = 'node:22-bookworm-slim';
const FREE_CPUS = '0';

const docker = (...args: string[]): Promise<string> => output('docker', args);

async function imageName(): Promise<string> {
  const given = processEnvironment().LAMINA_NODE_IMAGE;
  if (given !== undefined && given !== '') return given;
  return docker('image', 'inspect', OFFLINE_IMAGE).then(
    () => OFFLINE_IMAGE,
    () => DEFAULT_IMAGE,
  );
}

/** Options and image of a container that runs this checkout. */
const container = (image: string, run: string, environment: Readonly<Record<string, string>>): string[] => [
  ...['--rm', '--init', '--network', 'host', '--label', `lamina.bench=${run}`],
  ...['--volume', `${ROOT_DIRECTORY}:/app:ro`, '--workdir', '/app'],
  ...Object.entries(environment).flatMap(([name, value]) => ['--env', `${name}=${value}`]),
  image,
];

/** A shard in a container. @returns the container's id. */
async function startShard(image: string, natsUrl: string, budgetBytes: number, run: string): Promise<string> {
  const environment = {
    LAMINA_NATS_URL: natsUrl,
    LAMINA_KV_BUDGET_BYTES: String(budgetBytes),
    LAMINA_ATTENTION_THREADS: '1',
    LAMINA_ATTENTION_KERNEL: 'native',
  };
  const started = container(image, run, environment);
  return (await docker('run', '--detach', ...started, 'node', 'services/attention-shard/dist/main.js')).trim();
}

/**
 * Tokens per second through all layers of `numShards` kernels with nothing around them, each in a container with the quota:
 * what shards could do if hops cost nothing and nobody waited for anybody.
 */
async function measureKernels(
  image: string,
  run: string,
  { numShards, numLayers, seconds }: { numShards: number; numLayers: number; seconds: number },
): Promise<number> {
  const kernels: ChildProcess[] = [];
  const names = Array.from({ length: numShards }, (_, i) => `lamina-kernel-${run}-${numShards}-${i}`);
  let numDone = 0;
  try {
    for (const name of names) {
      const script = ['node', 'bench/dist/kernel-alone.js', String(numShards), String(numLayers)];
      const child = spawn('docker', ['run', '--name', name, ...container(image, run, {}), ...script], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      kernels.push(child);
      await new Promise<void>((resolve, reject) => {
        child.stdout.once('data', resolve);
        child.once('exit', (code) => reject(new Error(`a kernel ended with ${code} before it began`)));
      });
      child.stdout.on('data', (chunk: Buffer) => {
        numDone += chunk.length;
      });
      await docker('update', '--cpus', QUOTA_CPUS, name);
    }
    await sleep(seconds * 250);
    const [before, startedMs] = [numDone, performance.now()];
    await sleep(seconds * 1000);
    const numEnded = kernels.filter(({ exitCode }) => exitCode !== null).length;
    if (numEnded > 0) throw new Error(`${numEnded} of ${numShards} kernels ended while they were measured`);
    const layersPerSecond = (1000 * (numDone - before)) / (performance.now() - startedMs);
    return (layersPerSecond * SCALE.numRequests) / (numLayers * numShards);
  } finally {
    // What could not be started is not there to be removed, and its own error says more.
    await docker('rm', '--force', ...names.slice(0, kernels.length)).catch(() => undefined);
  }
}

export async function scale(context: Context): Promise<Row[]> {
  const name = (numShards: number, peerName: string, mustReach: number | null): RowName => ({
    part: 'scale',
    name: `${numShards} shards of ${QUOTA_CPUS} CPU, context ${SCALE.contextTokens}`,
    unit: 'attention tok/s',
    peerName,
    mustReach,
  });
  const names = [
    ...CASES.map(({ numShards, mustReach }) => name(numShards, `${numShards} x one shard`, mustReach)),
    ...CASES.map(({ numShards }) => name(numShards, `${numShards} bare kernels`, null)),
  ];
  const run = randomUUID();
  return measuredTogether(names, async () => {
    const image = await imageName();
    const layout = scaleLayoutOf(context.isQuick ? 6 : shapeOf(SCALE.model).shape.numLayers);
    const { numRequests, contextTokens, blockSizeTokens } = SCALE;
    const numBlocks = (numRequests * contextTokens) / blockSizeTokens;
    const binary = processEnvironment().LAMINA_NATS_SERVER;
    const nats = await startNatsServer({
      maxPayloadBytes: MAX_PAYLOAD_BYTES,
      ...(binary === undefined ? {} : { binary }),
    });
    const containers: string[] = [];
    let driver: AttentionDriver | undefined;
    try {
      driver = await AttentionDriver.start(nats.url, layout);
      for (let i = 0; i < MOST_SHARDS; i++)
        containers.push(await startShard(image, nats.url, numBlocks * blockBytes(layout), run));
      const shardIds = await driver.shards(MOST_SHARDS, numBlocks);
      context.say('  writing KV');
      for (const [i, shardId] of shardIds.entries()) {
        // The most that this shard holds of any case: cases use the first shards.
        const fewest = [1, ...CASES.map(({ numShards }) => numShards)].find((numShards) => numShards > i)!;
        await driver.fill(shardId, Math.min(numBlocks, Math.ceil(numBlocks / fewest) + numRequests));
      }
      await docker('update', '--cpus', QUOTA_CPUS, ...containers);
      const seconds = context.isQuick ? 4 : 10;
      const options = { numRequests, contextTokens, seconds };
      const runs: Pair[][] = CASES.map(() => []);
      const runsOfKernels: Pair[][] = CASES.map(() => []);
      for (let round = 0; round < Math.min(context.rounds, 3); round++) {
        const single = await driver.measure(shardIds.slice(0, 1), options);
        for (const [i, { numShards }] of CASES.entries()) {
          const ours = await driver.measure(shardIds.slice(0, numShards), options);
          runs[i]!.push({ ours, peer: numShards * single });
          const kernels = await measureKernels(image, run, { numShards, numLayers: layout.numLayers, seconds });
          runsOfKernels[i]!.push({ ours, peer: kernels });
          context.say(
            `  ${numShards} shards: ${ours.toFixed(1)} tok/s, one ${single.toFixed(1)}, bare kernels ${kernels.toFixed(1)}`,
          );
        }
      }
      const checks = [
        `${numBlocks} blocks of ${blockSizeTokens} tokens, ${layout.numLayers} layers, written before they were read`,
      ];
      return [...runs, ...runsOfKernels].map((pairs) => ({ runs: pairs, checks }));
    } finally {
      await driver?.close();
      await docker('update', '--cpus', FREE_CPUS, ...containers).catch(() => undefined);
      if (containers.length > 0) await docker('rm', '--force', ...containers);
      await nats.stop();
    }
  });
}
