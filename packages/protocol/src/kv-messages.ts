/**
 * Owns the control-plane messages of the kv-manager: registration, block tables, status and its events.
 *
 * Invariants
 * 1. `managerEpoch` changes when a kv-manager starts: block tables of another epoch are void.
 * 2. A shard that restarts, or that the kv-manager no longer knows, takes a new shardId, so a block reference can never
 *    reach memory that was given to somebody else since.
 * 3. Blocks are given to another request only when their owner has said that it stopped using them (free, trim, or
 *    allocate of the same id). Until then a table that is of no use any more is `void` and keeps its blocks. Those of an
 *    executor that was lost or left are fenced: free when every shard that has some has confirmed that it takes nothing
 *    more from the executor's origins.
 * 4. Origin ids never come back: an executor that was lost and is registered anew sends under others.
 */
import { z } from 'zod';
import { LIMITS } from './limits.ts';
import { attentionSpecSchema, idSchema, kvLayoutSchema } from './schema.ts';

/** `originId` of tensor frames: one per worker of an executor. */
const originIdsSchema = z.array(z.int().min(0).max(0xffff_ffff)).min(1);

export const executorHeartbeatSchema = z.object({
  executorId: idSchema,
  modelId: z.string(),
  spec: attentionSpecSchema,
  /** Under which its workers send, from the answer to this heartbeat on. */
  originIds: originIdsSchema.max(LIMITS.originsOfExecutor),
});
export const executorHeartbeatReplySchema = z.object({
  managerEpoch: z.string(),
  layout: kvLayoutSchema,
  heartbeatIntervalMs: z.int().min(1),
  /** Silence after which the executor counts as lost: without an answered heartbeat for so long it must not write KV. */
  heartbeatTimeoutMs: z.int().min(1),
  /**
   * Another number than before: the executor was lost and is registered anew, so whatever tables it had are gone and it
   * must drop them and take other origin ids. Every reply says so, since the first one may be lost.
   */
  registration: z.int().min(1),
  /** Requests of this executor whose table is void because a shard of it was lost. */
  voidRequestIds: z.array(idSchema),
  /** Requests of this executor that another one has taken over: it must drop them without a word. */
  takenOverRequestIds: z.array(idSchema),
});

export type ExecutorHeartbeat = z.infer<typeof executorHeartbeatSchema>;
export type ExecutorHeartbeatReply = z.infer<typeof executorHeartbeatReplySchema>;

export const shardHeartbeatSchema = z.object({
  shardId: idSchema,
  budgetBytes: z.int().min(1),
  /** Name of the attention kernel in use. */
  kernel: z.string(),
  /** Blocks that fit the budget; null until the shard knows the layout and has its memory. */
  numBlocks: z.int().min(0).nullable(),
  /**
   * Fences up to this number that this shard was told of hold: it takes nothing more from their origins, and no layer of
   * theirs is in its kernel. 0: none.
   */
  fencedUpTo: z.int().min(0),
});
/** An executor that is no more, whose blocks wait for the shards. Numbers count up. */
const fenceSchema = z.object({
  number: z.int().min(1),
  originIds: originIdsSchema.max(LIMITS.originsOfFence),
});
export type FenceNotice = z.infer<typeof fenceSchema>;
export const shardHeartbeatReplySchema = z.object({
  managerEpoch: z.string(),
  /** null until the first executor has registered a model. */
  layout: kvLayoutSchema.nullable(),
  heartbeatIntervalMs: z.int().min(1),
  /** false when a shard with memory is not registered (the kv-manager restarted, lost it, or dropped the layout): it must come again under a new shardId. */
  known: z.boolean(),
  usedBlocks: z.int().min(0),
  usedBlocksPeak: z.int().min(0),
  /** The oldest fences that this shard has not confirmed, ascending. */
  fences: z.array(fenceSchema).max(LIMITS.fencesOfReply),
});
export type ShardHeartbeat = z.infer<typeof shardHeartbeatSchema>;
export type ShardHeartbeatReply = z.infer<typeof shardHeartbeatReplySchema>;

/** One entry of a block table; its index there says which tokens it holds. */
const blockRefSchema = z.object({ shardId: idSchema, block: z.int().min(0) });
export type BlockRef = z.infer<typeof blockRefSchema>;

export const allocateSchema = z.object({
  requestId: idSchema,
  executorId: idSchema,
  /** Tokens that must have room now. */
  numTokens: z.int().min(1),
  /**
   * Tokens whose KV the request can need at a time: prompt + max_tokens, or less when it will trim. Refused at once if
   * the cluster could never hold them.
   */
  maxTokens: z.int().min(1),
  /** How often the queue has offered the request: an executor that was offered it later takes it over, never the other way. */
  deliveryCount: z.int().min(1),
  /** As above, of the offers since something of the answer was stored: if nothing was, the same. Absent: not known. */
  vainDeliveryCount: z.int().min(1).optional(),
});
export const extendSchema = z.object({
  requestId: idSchema,
  executorId: idSchema,
  /** Blocks that the caller knows of, trimmed ones included: the reply has those after them, so asking twice is safe. */
  numBlocks: z.int().min(0),
  /** Tokens that must have room after this call, those of earlier calls and trimmed ones included. */
  numTokens: z.int().min(1),
});
export const blocksReplySchema = z.object({ managerEpoch: z.string(), blocks: z.array(blockRefSchema) });
export const trimSchema = z.object({
  requestId: idSchema,
  executorId: idSchema,
  /** Blocks at the start of the table that are given back, those of earlier calls included. */
  numFreedBlocks: z.int().min(0),
});
export const freeSchema = z.object({ requestId: idSchema, executorId: idSchema });
export const executorLeaveSchema = z.object({ executorId: idSchema });
export const emptySchema = z.object({});

const shardStatusSchema = z.object({
  shardId: idSchema,
  kernel: z.string(),
  budgetBytes: z.int(),
  numBlocks: z.int(),
  usedBlocks: z.int(),
  usedBlocksPeak: z.int(),
});
export const kvStatusSchema = z.object({
  managerEpoch: z.string(),
  modelId: z.string().nullable(),
  layout: kvLayoutSchema.nullable(),
  executors: z.array(z.object({ executorId: idSchema, modelId: z.string() })),
  shards: z.array(shardStatusSchema),
  numRequests: z.int(),
});
export type KvStatus = z.infer<typeof kvStatusSchema>;

export const shardLostSchema = z.object({ shardId: idSchema });
export const suspectReplySchema = z.object({
  /** The shard is not registered, or was asked and did not answer: what it held is gone. */
  isLost: z.boolean(),
});
export const capacityFreedSchema = z.object({ freeBlocks: z.int().min(0) });
