/**
 * Owns one life of this shard's memory: a shard id, a kernel over its blocks, and the tensor plane in front of it.
 *
 * Invariants
 * 1. The memory of one life is given back before that of the next is taken: the budget is never exceeded.
 * 2. What was addressed to a former life reaches nobody: every life has its own id and so its own subject.
 */
import { createKernel } from '@lamina/attention-kernel';
import { isForbiddenReply, type TensorLink } from '@lamina/bus';
import { SUBJECTS } from '@lamina/protocol';
import type { ServiceContext } from '@lamina/runtime';
import { blockBytes, type KvLayout, LaminaError } from '@lamina/tensor';
import type { ShardStats } from './shard-stats.ts';
import { TensorPlane } from './tensor-plane.ts';

export type ShardContext = Pick<
  ServiceContext,
  'instanceId' | 'config' | 'bus' | 'log' | 'registry' | 'complain' | 'fail'
>;

/** What a life needs besides: tensors do not travel with the rest. */
export type LifeContext = Pick<ShardContext, 'config' | 'log'> & { readonly link: TensorLink };

export class Incarnation {
  readonly shardId: string;
  readonly kernelName: string;
  readonly numBlocks: number;
  readonly layout: KvLayout;
  readonly plane: TensorPlane;
  readonly #stopListening: () => void;

  /** @throws LaminaError `config_invalid` when the budget holds no block, or the memory cannot be had. */
  constructor(context: LifeContext, shardId: string, layout: KvLayout, stats: ShardStats) {
    const { config, link, log } = context;
    this.shardId = shardId;
    this.layout = layout;
    this.numBlocks = blocksWithin(config.kvBudgetBytes, layout);
    const { kernel, fallbackReason } = createKernel({
      layout,
      numBlocks: this.numBlocks,
      numThreads: config.attentionThreads,
      kind: config.attentionKernel,
    });
    this.kernelName = kernel.name;
    if (fallbackReason !== null && config.attentionKernel === 'auto')
      log.warn({ reason: fallbackReason }, 'portable attention kernel in use, which is slow: no native one');
    const frames = link.kind === 'native' ? kernel.frames : undefined;
    this.plane = new TensorPlane({ kernel, link, log, stats, frames });
    const { plane } = this;
    const tensors = link.subscribe(
      SUBJECTS.shardTensors(shardId),
      (message) => plane.onMessage(message),
      frames?.handler,
    );
    const probes = link.subscribe(SUBJECTS.shardProbe(shardId), ({ reply }) => {
      if (reply !== undefined && !isForbiddenReply(reply)) link.publish(reply, new Uint8Array());
    });
    this.#stopListening = () => {
      tensors.unsubscribe();
      probes.unsubscribe();
    };
    // Sinks are many numbers and not a shard's business.
    const { sinkLogits: _, ...facts } = layout;
    log.info({ shardId, kernel: kernel.name, numBlocks: this.numBlocks, ...facts }, 'KV memory ready');
  }

  /** Answers what is in flight, then gives the memory back. */
  async end(): Promise<void> {
    await this.plane.close();
    this.#stopListening();
  }
}

/** Slots are int32 on the wire. */
const MAX_SLOTS = 2 ** 31 - 1;

function blocksWithin(budgetBytes: number, layout: KvLayout): number {
  const bytes = blockBytes(layout);
  const numBlocks = Math.min(Math.floor(budgetBytes / bytes), Math.floor(MAX_SLOTS / layout.blockSizeTokens));
  if (numBlocks > 0) return numBlocks;
  throw new LaminaError(
    'config_invalid',
    `the KV budget of ${budgetBytes} bytes holds no block: one block of ${layout.blockSizeTokens} tokens of this model ` +
      `needs ${bytes} bytes; raise LAMINA_KV_BUDGET_BYTES`,
  );
}
