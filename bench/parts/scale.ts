/**
 * Owns the rows of scale: attention of 1, 2, 4 and 8 shards, each in a container with a CPU quota.
 *
 * Invariants
 * 1. The quota is set when KV is written, so that the preparation does not take ten times as long; it holds in all that is
 *    measured.
 * 2. Containers are removed whatever happens. They run this checkout, mounted read-only, on the host's network.
 */
import { randomUUID } from 'node:crypto';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { processEnvironment } from '@lamina/runtime';
import { blockBytes, type KvLayout } from '@lamina/tensor';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { AttentionDriver } from '../attention-driver.ts';
import type { Context } from '../context.ts';
import { shapeOf } from '../models.ts';
import { output } from '../processes.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';
import type { Pair } from '../statistics.ts';

const QUOTA_CPUS = '0.15';
const CONTEXT_TOKENS = 8192;
const BLOCK_SIZE_TOKENS = 32;
const NUM_REQUESTS = 8;
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

function layoutOf(numLayers: number): KvLayout {
  const { shape } = shapeOf('smollm2-135m');
  const { numHeads, numKvHeads, headDim } = shape;
  const scale = headDim ** -0.5;
  return { numLayers, numHeads, numKvHeads, headDim, scale, blockSizeTokens: BLOCK_SIZE_TOKENS, kvDtype: 'f16' };
}

/** A shard in a container. @returns the container's id. */
async function startShard(image: string, natsUrl: string, budgetBytes: number, run: string): Promise<string> {
  const environment = {
    LAMINA_NATS_URL: natsUrl,
    LAMINA_KV_BUDGET_BYTES: String(budgetBytes),
    LAMINA_ATTENTION_THREADS: '1',
    LAMINA_ATTENTION_KERNEL: 'native',
  };
  const id = await docker(
    ...['run', '--detach', '--rm', '--init', '--network', 'host', '--label', `lamina.bench=${run}`],
    ...['--volume', `${ROOT_DIRECTORY}:/app:ro`, '--workdir', '/app'],
    ...Object.entries(environment).flatMap(([name, value]) => ['--env', `${name}=${value}`]),
    ...[image, 'node', 'services/attention-shard/dist/main.js'],
  );
  return id.trim();
}

export async function scale(context: Context): Promise<Row[]> {
  const name = (numShards: number, mustReach: number | null): RowName => ({
    part: 'scale',
    name: `${numShards} shards of ${QUOTA_CPUS} CPU, context ${CONTEXT_TOKENS}`,
    unit: 'attention tok/s',
    peerName: `${numShards} x one shard`,
    mustReach,
  });
  const names = CASES.map(({ numShards, mustReach }) => name(numShards, mustReach));
  const run = randomUUID();
  return measuredTogether(names, async () => {
    const image = await imageName();
    const layout = layoutOf(context.isQuick ? 6 : shapeOf('smollm2-135m').shape.numLayers);
    const numBlocks = (NUM_REQUESTS * CONTEXT_TOKENS) / BLOCK_SIZE_TOKENS;
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
        await driver.fill(shardId, Math.min(numBlocks, Math.ceil(numBlocks / fewest) + NUM_REQUESTS));
      }
      await docker('update', '--cpus', QUOTA_CPUS, ...containers);
      const seconds = context.isQuick ? 4 : 10;
      const options = { numRequests: NUM_REQUESTS, contextTokens: CONTEXT_TOKENS, seconds };
      const runs: Pair[][] = CASES.map(() => []);
      for (let round = 0; round < Math.min(context.rounds, 3); round++) {
        const single = await driver.measure(shardIds.slice(0, 1), options);
        for (const [i, { numShards }] of CASES.entries()) {
          const ours = await driver.measure(shardIds.slice(0, numShards), options);
          runs[i]!.push({ ours, peer: numShards * single });
          context.say(`  ${numShards} shards: ${ours.toFixed(1)} tok/s, one ${single.toFixed(1)}`);
        }
      }
      const checks = [
        `${numBlocks} blocks of ${BLOCK_SIZE_TOKENS} tokens, ${layout.numLayers} layers, written before they were read`,
      ];
      return runs.map((pairs) => ({ runs: pairs, checks }));
    } finally {
      await driver?.close();
      await docker('update', '--cpus', FREE_CPUS, ...containers).catch(() => undefined);
      if (containers.length > 0) await docker('rm', '--force', ...containers);
      await nats.stop();
    }
  });
}
