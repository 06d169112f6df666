/**
 * Owns the uncut reference: the whole model in one ONNX Runtime session, attention included, one process, one request.
 * What the distributed system answers is compared with this.
 *
 * Invariants
 * 1. It shares weights with the staged graph (one file) and nothing else: attention is ONNX Runtime's.
 * 2. One call at a time; concurrent calls are run one after the other.
 */
import { type BuiltModel, type ModelDescription, UNCUT_NAMES } from '@lamina/model';
import { InferenceSession, Tensor } from 'onnxruntime-node';

/** Session options of everything that runs a graph of Lamina on the CPU. Spinning threads starve the other actors. */
export const REFERENCE_SESSION_OPTIONS: InferenceSession.SessionOptions = {
  executionProviders: ['cpu'],
  intraOpNumThreads: 1,
  interOpNumThreads: 1,
  enableMemPattern: false,
  extra: { session: { intra_op: { allow_spinning: '0' } } },
};

export interface GreedyResult {
  readonly tokenIds: number[];
  /** [vocabSize] of every step: `logits[i]` is what `tokenIds[i]` is the argmax of. */
  readonly logits: Float32Array[];
}

/** KV of one request: per layer [1, numKvHeads, P, headDim] float32. */
type KvCache = ReadonlyMap<string, Tensor>;

interface StepResult {
  /** [S, vocabSize], one row per given token. */
  readonly rows: Float32Array[];
  readonly cache: KvCache;
}

export class UncutReference {
  readonly #session: InferenceSession;
  readonly #model: ModelDescription;
  #turn: Promise<unknown> = Promise.resolve();

  private constructor(session: InferenceSession, model: ModelDescription) {
    this.#session = session;
    this.#model = model;
  }

  static async load(built: BuiltModel): Promise<UncutReference> {
    const session = await InferenceSession.create(built.uncutGraphPath, REFERENCE_SESSION_OPTIONS);
    return new UncutReference(session, built.description);
  }

  /**
   * Greedy generation. Stops after `maxTokens` or at an end-of-sequence token, which is the last of `tokenIds`, unless
   * `ignoreEos`. Of equal logits the lowest token id wins.
   */
  greedy(
    promptTokenIds: readonly number[],
    maxTokens: number,
    options: { ignoreEos?: boolean } = {},
  ): Promise<GreedyResult> {
    return this.#inTurn(async () => {
      const tokenIds: number[] = [];
      const logits: Float32Array[] = [];
      let cache: KvCache = this.#emptyCache();
      let pending = promptTokenIds;
      let cachedTokens = 0;
      while (tokenIds.length < maxTokens) {
        const step = await this.#step(pending, cachedTokens, cache);
        cachedTokens += pending.length;
        cache = step.cache;
        const row = step.rows.at(-1);
        if (row === undefined) throw new RangeError('the prompt is empty');
        const tokenId = argmax(row);
        tokenIds.push(tokenId);
        logits.push(row);
        if (options.ignoreEos !== true && this.#model.eosTokenIds.includes(tokenId)) break;
        pending = [tokenId];
      }
      return { tokenIds, logits };
    });
  }

  /** Teacher forcing: [vocabSize] at every position of `tokenIds`, in one prefill. */
  logits(tokenIds: readonly number[]): Promise<Float32Array[]> {
    return this.#inTurn(async () => (await this.#step(tokenIds, 0, this.#emptyCache())).rows);
  }

  async release(): Promise<void> {
    await this.#inTurn(() => this.#session.release());
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work);
    this.#turn = result.catch(() => {});
    return result;
  }

  #cacheNames(): { past: string; present: string }[] {
    const parts = ['key', 'value'] as const;
    return Array.from({ length: this.#model.attention.numLayers }).flatMap((_, layer) =>
      parts.map((part) => ({ past: UNCUT_NAMES.past(layer, part), present: UNCUT_NAMES.present(layer, part) })),
    );
  }

  #emptyCache(): KvCache {
    const { numKvHeads, headDim } = this.#model.attention;
    return new Map(
      this.#cacheNames().map(({ past }) => [
        past,
        new Tensor('float32', new Float32Array(0), [1, numKvHeads, 0, headDim]),
      ]),
    );
  }

  async #step(tokenIds: readonly number[], cachedTokens: number, cache: KvCache): Promise<StepResult> {
    const total = cachedTokens + tokenIds.length;
    const feeds: Record<string, Tensor> = {
      [UNCUT_NAMES.tokenIds]: new Tensor('int64', BigInt64Array.from(tokenIds, BigInt), [1, tokenIds.length]),
      [UNCUT_NAMES.seqlensK]: new Tensor('int32', Int32Array.of(total - 1), [1]),
      [UNCUT_NAMES.totalSequenceLength]: new Tensor('int32', Int32Array.of(total), []),
      ...Object.fromEntries(cache),
    };
    const outputs = await this.#session.run(feeds);
    const nextCache = new Map<string, Tensor>();
    for (const { past, present } of this.#cacheNames()) nextCache.set(past, outputOf(outputs, present));
    const { data } = outputOf(outputs, UNCUT_NAMES.logits);
    if (!(data instanceof Float32Array)) throw new TypeError('logits are not float32');
    const { vocabSize } = this.#model;
    const rows = tokenIds.map((_, i) => data.slice(i * vocabSize, (i + 1) * vocabSize));
    return { rows, cache: nextCache };
  }
}

function outputOf(outputs: InferenceSession.ReturnType, name: string): Tensor {
  const output = outputs[name];
  if (!(output instanceof Tensor)) throw new TypeError(`the graph has no output tensor '${name}'`);
  return output;
}

/** Index of the largest value; the lowest of equals. */
export function argmax(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}
