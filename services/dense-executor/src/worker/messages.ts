/**
 * Owns what the main thread and the worker threads of one executor tell each other.
 *
 * Invariants
 * 1. A wave has at most one step in flight; stepId grows by STEP_ID_STRIDE per step of the executor.
 * 2. All that a step needs travels with its request; between that and the result the worker asks nobody.
 */
import type { NatsAccess, TensorLinkKind } from '@lamina/bus';
import type { AttentionSpec, ErrorCode, KvDtype, StepPlan } from '@lamina/tensor';
import type { NativeGuardMemory } from './native-guard.ts';

export interface WorkerOptions {
  readonly workerId: string;
  /** Of this executor's workers. */
  readonly workerIndex: number;
  readonly nativeGuard: NativeGuardMemory;
  /** Random; names this worker in every tensor frame until it is given another. */
  readonly originId: number;
  readonly natsUrl: string;
  readonly natsConnectTimeoutMs: number;
  readonly natsAccess: NatsAccess;
  readonly tensorLink: TensorLinkKind;
  readonly stagedGraphPath: string;
  /** Directory that the graph's external data is relative to. */
  readonly dataDir: string;
  readonly numWaves: number;
  /** Shared memory of the KvLease. */
  readonly lease: SharedArrayBuffer;
  readonly intraOpThreads: number;
  readonly gatherTimeoutMs: number;
  /** Tensor frames carry a checksum of their tensors. */
  readonly isBodyChecked: boolean;
  readonly dims: ModelDims;
}

export interface ModelDims extends AttentionSpec {
  readonly hiddenSize: number;
  readonly vocabSize: number;
}

/** One shard's part of a step. */
export interface ShardPart {
  readonly shardId: string;
  /** Encoded plan frame, header space included; the worker fills in ids. */
  readonly plan: Uint8Array<ArrayBuffer>;
  /** Rows of the wave whose queries this shard gets, in its order. */
  readonly queryRows: Int32Array<ArrayBuffer>;
  /** Rows of the wave whose K and V this shard stores, in its order. */
  readonly kvRows: Int32Array<ArrayBuffer>;
}

/** Prefill chunks of a step whose attention to themselves the executor computes (self-attention.ts). */
export interface SelfPart {
  /** Over scratch blocks 0 .. numBlocks - 1; query rows and KV rows are both `rows`. */
  readonly plan: StepPlan;
  /** Rows of the wave. */
  readonly rows: Int32Array<ArrayBuffer>;
  readonly numBlocks: number;
  readonly blockSizeTokens: number;
  readonly kvDtype: KvDtype;
}

/**
 * Fields of one sampled row: temperature, topP, topK, minP, seed, tokenIndex, numLogprobs, and 1 when the next sampled row
 * is that of a drafted token: it counts only if this row's token is the drafted one.
 */
export const SAMPLING_FIELDS = 8;
/** In place of a token: the row follows a draft that was wrong. */
export const NOT_WANTED = -2;

/** Step ids from one step to the next: those between are of the steps that take it back (retraction.ts). */
export const STEP_ID_STRIDE = 16;

export interface StepRequest {
  readonly kind: 'step';
  readonly waveIndex: number;
  readonly stepId: number;
  /** Term of the KvLease in which its blocks were this executor's. */
  readonly leaseTerm: number;
  /** [numTokens] */
  readonly tokenIds: BigInt64Array<ArrayBuffer>;
  /** [numTokens] absolute positions. */
  readonly positionIds: BigInt64Array<ArrayBuffer>;
  /** Rows of the wave whose next token is wanted, ascending. */
  readonly sampledRows: Int32Array<ArrayBuffer>;
  /** [sampledRows.length, SAMPLING_FIELDS] */
  readonly sampling: Float64Array<ArrayBuffer>;
  /** Of the tensors that travel. */
  readonly kvDtype: KvDtype;
  readonly shards: readonly ShardPart[];
  readonly self: SelfPart | null;
}

export interface ShardLost {
  readonly kind: 'shardLost';
  readonly shardId: string;
}

/** The result of a step is of no use any more: it is to fail as soon as the thread gets to it. One that ended is left alone. */
export interface Abort {
  readonly kind: 'abort';
  readonly waveIndex: number;
  readonly stepId: number;
}

/** Another origin id, for the steps that come after it; those in flight fail. */
export interface NewOrigin {
  readonly kind: 'origin';
  readonly originId: number;
}

export interface Stop {
  readonly kind: 'stop';
}

export type ToWorker = StepRequest | ShardLost | Abort | NewOrigin | Stop;

/** Milliseconds of one step by cause. */
export interface StepTimings {
  readonly denseMs: number;
  /** Waiting for the attention gather, other waves' work on this thread included. */
  readonly waitMs: number;
  /** Packing and merging tensors, publishing. */
  readonly codecMs: number;
  readonly sampleMs: number;
  readonly totalMs: number;
}

export interface StepDone {
  readonly kind: 'stepDone';
  readonly waveIndex: number;
  readonly stepId: number;
  /** [sampledRows.length]; -1 where the logits were not finite, NOT_WANTED behind a wrong draft. */
  readonly tokens: Int32Array;
  /** [sampledRows.length]; NaN where not asked for. */
  readonly logprobs: Float64Array;
  /** Per sampled row, empty where not asked for; null when no row asked. */
  readonly topLogprobs: readonly { token: number; logprob: number }[][] | null;
  readonly timings: StepTimings;
}

export interface StepFailed {
  readonly kind: 'stepFailed';
  readonly waveIndex: number;
  readonly stepId: number;
  readonly code: ErrorCode;
  readonly message: string;
  /** Shards that are to blame, empty when the executor itself is. */
  readonly shardIds: readonly string[];
  /** Only a frame was refused, here or by a shard that says so: the shards live, and hold what they held. */
  readonly isRefusal: boolean;
}

export interface Ready {
  readonly kind: 'ready';
  /** Why tensors do not travel on a native connection, if they were to; else null. */
  readonly linkFallbackReason: string | null;
}

/** Something odd that did not fail a step: counted and logged by the main thread. */
export interface Complaint {
  readonly kind: 'complaint';
  readonly code: ErrorCode;
  readonly message: string;
}

/** Shards that let a layer wait for long: they may be busy, or dead. */
export interface Late {
  readonly kind: 'late';
  readonly shardIds: readonly string[];
}

export type FromWorker = Ready | StepDone | StepFailed | Complaint | Late;
