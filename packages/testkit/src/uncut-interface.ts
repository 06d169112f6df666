/**
 * Owns how an uncut graph is fed and read: the builder's own, by UNCUT_NAMES, and published ones as transformers.js
 * feeds them.
 */
import { type ModelDescription, UNCUT_NAMES } from '@lamina/model';
import { float16BitsToFloat32 } from '@lamina/tensor';
import { type InferenceSession, Tensor } from 'onnxruntime-node';

/** KV of one request, by the names of the inputs. */
export type KvCache = ReadonlyMap<string, Tensor>;

export interface UncutInterface {
  /** Inputs of the cache, and the outputs that replace them. */
  readonly caches: readonly { readonly past: string; readonly present: string }[];
  readonly logits: string;
  emptyCache(): KvCache;
  /** All inputs but the cache, for one request. */
  feeds(tokenIds: readonly number[], cachedTokens: number): Record<string, Tensor>;
}

const int64 = (values: readonly number[], dims: readonly number[]): Tensor =>
  new Tensor('int64', BigInt64Array.from(values, BigInt), dims);

export function builtInterface({ attention }: ModelDescription): UncutInterface {
  const { numLayers, numKvHeads, headDim } = attention;
  const caches = Array.from({ length: numLayers }).flatMap((_, layer) =>
    (['key', 'value'] as const).map((part) => ({
      past: UNCUT_NAMES.past(layer, part),
      present: UNCUT_NAMES.present(layer, part),
    })),
  );
  const empty = (): Tensor => new Tensor('float32', new Float32Array(0), [1, numKvHeads, 0, headDim]);
  return {
    caches,
    logits: UNCUT_NAMES.logits,
    emptyCache: () => new Map(caches.map(({ past }) => [past, empty()])),
    feeds: (tokenIds, cachedTokens) => {
      const total = cachedTokens + tokenIds.length;
      return {
        [UNCUT_NAMES.tokenIds]: int64(tokenIds, [1, tokenIds.length]),
        [UNCUT_NAMES.seqlensK]: new Tensor('int32', Int32Array.of(total - 1), [1]),
        [UNCUT_NAMES.totalSequenceLength]: new Tensor('int32', Int32Array.of(total), []),
      };
    },
  };
}

/** Whatever inputs the graph has, by name; caches in the order in which the graph names them. */
export function publishedInterface({ inputMetadata, outputMetadata }: InferenceSession): UncutInterface {
  const inputs = inputMetadata.flatMap((input) => (input.isTensor ? [input] : []));
  const pasts = inputs.filter(({ name }) => name.startsWith('past'));
  const presents = outputMetadata.filter(({ name }) => name.startsWith('present'));
  const caches = pasts.map(({ name }, i) => ({ past: name, present: presents[i]?.name ?? '' }));
  return {
    caches,
    logits: 'logits',
    emptyCache: () =>
      new Map(
        pasts.map(({ name, type, shape }) => {
          const pastAxis = shape.length - 2;
          const dims = shape.map((dim, i) => (i === pastAxis ? 0 : typeof dim === 'number' ? dim : 1));
          const data = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
          return [
            name,
            data instanceof Uint16Array ? new Tensor('float16', data, dims) : new Tensor('float32', data, dims),
          ];
        }),
      ),
    feeds: (tokenIds, cachedTokens) => {
      const tokens = tokenIds.length;
      const total = cachedTokens + tokens;
      const known: Readonly<Record<string, () => Tensor>> = {
        input_ids: () => int64(tokenIds, [1, tokens]),
        attention_mask: () =>
          int64(
            Array.from({ length: total }, () => 1),
            [1, total],
          ),
        position_ids: () =>
          int64(
            tokenIds.map((_, i) => cachedTokens + i),
            [1, tokens],
          ),
        use_cache_branch: () => new Tensor('bool', Uint8Array.of(1), [1]),
        num_logits_to_keep: () => int64([0], []),
      };
      return Object.fromEntries(
        inputs.flatMap(({ name }) => {
          if (name.startsWith('past')) return [];
          const make = known[name];
          if (make === undefined) throw new TypeError(`nothing is known to feed '${name}' with`);
          return [[name, make()]];
        }),
      );
    },
  };
}

/** Elements of a float32 or float16 tensor. */
export function floatsOf({ type, data }: Tensor): Float32Array {
  if (data instanceof Float32Array) return data;
  if (type === 'float16' && data instanceof Uint16Array) return Float32Array.from(data, float16BitsToFloat32);
  throw new TypeError(`logits are ${type}`);
}
