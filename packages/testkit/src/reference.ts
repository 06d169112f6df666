/**
 * Owns the uncut reference: the whole model in one ONNX Runtime session, attention included, one process, one request.
 * What the distributed system answers is compared with this.
 *
 * Invariants
 * 1. It shares weights with the staged graph (one file) and nothing else: attention is ONNX Runtime's.
 * 2. One call at a time; concurrent calls are run one after the other.
 */
import { dirname } from 'node:path';
import type { BuiltModel, ModelDescription } from '@lamina/model';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { builtInterface, floatsOf, type KvCache, publishedInterface, type UncutInterface } from './uncut-interface.ts';

/** Session options of everything that runs a graph of Lamina on the CPU. Spinning threads starve the other actors. */
export function referenceSessionOptions({ dataDir }: Pick<BuiltModel, 'dataDir'>): InferenceSession.SessionOptions {
  return {
    executionProviders: ['cpu'],
    intraOpNumThreads: 1,
    interOpNumThreads: 1,
    enableMemPattern: false,
    extra: {
      session: { intra_op: { allow_spinning: '0' }, model_external_initializers_file_folder_path: dataDir },
    },
  };
}

export interface GreedyResult {
  readonly tokenIds: number[];
  /** [vocabSize] of every step: `logits[i]` is what `tokenIds[i]` is the argmax of. */
  readonly logits: Float32Array[];
}

interface StepResult {
  /** [S, vocabSize], one row per given token. */
  readonly rows: Float32Array[];
  readonly cache: KvCache;
}

export class UncutReference {
  readonly #session: InferenceSession;
  readonly #model: ModelDescription;
  readonly #interface: UncutInterface;
  #turn: Promise<unknown> = Promise.resolve();

  private constructor(session: InferenceSession, model: ModelDescription, isPublished: boolean) {
    this.#session = session;
    this.#model = model;
    this.#interface = isPublished ? publishedInterface(session) : builtInterface(model);
  }

  static async load(built: BuiltModel): Promise<UncutReference> {
    const isPublished = built.uncutKind === 'published';
    // The data of a published graph is beside it, wherever that of the staged graph is.
    const dataDir = isPublished ? dirname(built.uncutGraphPath) : built.dataDir;
    const session = await InferenceSession.create(built.uncutGraphPath, referenceSessionOptions({ dataDir }));
    return new UncutReference(session, built.description, isPublished);
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
      let cache: KvCache = this.#interface.emptyCache();
      let pending = promptTokenIds;
      let cachedTokens = 0;
      while (tokenIds.length < maxTokens) {
        if (this.#outgrowsShort(cachedTokens, cachedTokens + pending.length)) {
          pending = [...promptTokenIds, ...tokenIds];
          cachedTokens = 0;
          cache = this.#interface.emptyCache();
        }
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
    return this.#inTurn(async () => (await this.#step(tokenIds, 0, this.#interface.emptyCache())).rows);
  }

  async release(): Promise<void> {
    await this.#inTurn(() => this.#session.release());
  }

  /** Whether a sequence stops being short: what is in the cache is then computed anew. */
  #outgrowsShort(cachedTokens: number, numTokens: number): boolean {
    const limit = this.#model.shortSequences?.numTokens ?? Number.POSITIVE_INFINITY;
    return cachedTokens > 0 && cachedTokens <= limit && numTokens > limit;
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work);
    this.#turn = result.catch(() => {});
    return result;
  }

  async #step(tokenIds: readonly number[], cachedTokens: number, cache: KvCache): Promise<StepResult> {
    const { feeds, caches, logits } = this.#interface;
    const outputs = await this.#session.run({ ...feeds(tokenIds, cachedTokens), ...Object.fromEntries(cache) });
    const nextCache = new Map<string, Tensor>();
    for (const { past, present } of caches) nextCache.set(past, outputOf(outputs, present));
    const data = floatsOf(outputOf(outputs, logits));
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
