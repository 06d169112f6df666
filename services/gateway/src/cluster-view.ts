/**
 * Owns what the gateway knows of the cluster: whether a prompt would be answered, and how much KV there is.
 *
 * Invariants
 * 1. A prompt never waits for a cluster that cannot answer it: no executor or no ready shard is `unavailable` at once.
 * 2. The kv-manager is asked at most once per STATUS_MAX_AGE_MS on behalf of prompts, and never when there are none.
 */
import { ENDPOINTS, type KvStatus } from '@lamina/protocol';
import { asLaminaError, LaminaError, maxWindowTokens } from '@lamina/tensor';

export type ClusterState =
  | {
      readonly status: 'ok';
      readonly executors: number;
      readonly shards: number;
      readonly freeBlocks: number;
      /** Tokens of one request for which all blocks of all shards have room; Infinity where it trims what it leaves behind. */
      readonly kvCapacityTokens: number;
    }
  | { readonly status: 'unavailable'; readonly reason: string };

const STATUS_MAX_AGE_MS = 1_000;

/** What a kv-manager's answer means for prompts of one model. */
function stateOf(status: KvStatus, modelId: string): ClusterState {
  const executors = status.executors.filter((executor) => executor.modelId === modelId).length;
  if (executors === 0) {
    const others = [...new Set(status.executors.map((executor) => executor.modelId))];
    const found = others.length === 0 ? '' : ` (those that run serve ${others.join(', ')})`;
    return { status: 'unavailable', reason: `no dense-executor serves "${modelId}"${found}` };
  }
  const ready = status.shards.filter((shard) => shard.numBlocks > 0);
  if (ready.length === 0 || status.layout === null) {
    return { status: 'unavailable', reason: 'no attention-shard is ready' };
  }
  const numBlocks = ready.reduce((sum, shard) => sum + shard.numBlocks, 0);
  const usedBlocks = ready.reduce((sum, shard) => sum + shard.usedBlocks, 0);
  return {
    status: 'ok',
    executors,
    shards: ready.length,
    freeBlocks: numBlocks - usedBlocks,
    // Where every layer has a window, a request gives back what it leaves behind: its length needs no room of its own.
    kvCapacityTokens: Number.isFinite(maxWindowTokens(status.layout))
      ? Number.POSITIVE_INFINITY
      : numBlocks * status.layout.blockSizeTokens,
  };
}

export interface StatusSource {
  readonly request: (
    endpoint: typeof ENDPOINTS.kvStatus,
    body: object,
    options: { timeoutMs: number },
  ) => Promise<KvStatus>;
}

export class ClusterView {
  readonly #source: StatusSource;
  readonly #modelId: string;
  readonly #timeoutMs: number;
  #state: ClusterState | undefined;
  #askedAtMs = 0;
  #asking: Promise<ClusterState> | undefined;

  constructor(source: StatusSource, modelId: string, timeoutMs: number) {
    this.#source = source;
    this.#modelId = modelId;
    this.#timeoutMs = timeoutMs;
  }

  /** The state as of now; callers that ask at the same time share one request. */
  async live(): Promise<ClusterState> {
    this.#asking ??= this.#ask().finally(() => {
      this.#asking = undefined;
    });
    return this.#asking;
  }

  /** The state as of at most STATUS_MAX_AGE_MS ago, or sooner if the last one was bad news. */
  async recent(): Promise<ClusterState> {
    const isRecent = performance.now() - this.#askedAtMs < STATUS_MAX_AGE_MS;
    return this.#state?.status === 'ok' && isRecent ? this.#state : this.live();
  }

  async #ask(): Promise<ClusterState> {
    const askedAtMs = performance.now();
    try {
      this.#state = stateOf(
        await this.#source.request(ENDPOINTS.kvStatus, {}, { timeoutMs: this.#timeoutMs }),
        this.#modelId,
      );
    } catch (cause) {
      const error = asLaminaError(cause);
      this.#state = {
        status: 'unavailable',
        reason: error.code === 'unavailable' ? 'no kv-manager answers' : `the kv-manager failed: ${error.message}`,
      };
    }
    this.#askedAtMs = askedAtMs;
    return this.#state;
  }
}

/** @throws LaminaError `unavailable` */
export function requireAvailable(state: ClusterState): Extract<ClusterState, { status: 'ok' }> {
  if (state.status === 'ok') return state;
  throw new LaminaError('unavailable', `nobody can answer now: ${state.reason}; retry later`);
}
