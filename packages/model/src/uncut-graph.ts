/**
 * Owns the uncut decoder graph: the same layers with their attention in place (GroupQueryAttention), KV as tensors in
 * and out. It is the reference that the distributed system must equal.
 *
 * Invariants
 * 1. It reads the same weights file as the staged graph.
 * 2. Rotary embedding is the attention operator's own wherever that can express it: another implementation than the
 *    staged graph's.
 * 3. The whole past of a request was computed with the table of its present length (ModelDescription.shortSequences):
 *    who feeds it past KV computes that anew when a request outgrows the short table.
 */
import { architectureOf } from './architecture.ts';
import {
  addAfterAttention,
  addEmbedding,
  addHead,
  addNormalization,
  addQkv,
  addRotary,
  type LayerContext,
  type QkvNames,
  type Residual,
} from './decoder-layers.ts';
import { GraphPiece } from './graph-piece.ts';
import type { ModelConfig } from './model-config.ts';
import {
  type AttributeValue,
  INT64_TYPE,
  MICROSOFT_DOMAIN,
  node,
  type OnnxGraph,
  type OnnxValueInfo,
  valueInfo,
} from './onnx.ts';
import type { WeightLayout } from './weight-layout.ts';

/** Names of the uncut graph's inputs and outputs; B requests, S new tokens each, P tokens in the KV cache. */
export const UNCUT_NAMES = {
  /** in: int64 [B, S] */
  tokenIds: 'token_ids',
  /** in: int32 [B]: tokens in the cache after this step, less one. */
  seqlensK: 'seqlens_k',
  /** in: int32 []: the longest of the batch after this step. */
  totalSequenceLength: 'total_sequence_length',
  /** out: float32 [B, S, vocabSize] */
  logits: 'logits',
  /** in: float32 [B, numKvHeads, P, headDim] */
  past: (layer: number, part: 'key' | 'value') => `past_key_values.${layer}.${part}`,
  /** out: float32 [B, numKvHeads, P + S, headDim] */
  present: (layer: number, part: 'key' | 'value') => `present.${layer}.${part}`,
} as const;

/** GroupQueryAttention rotates multiples of this many elements, in heads of multiples of it. */
const ROTARY_UNIT = 16;

export function buildUncutGraph(config: ModelConfig, layout: WeightLayout): OnnxGraph {
  const { tokenIds, seqlensK, totalSequenceLength, logits, past, present } = UNCUT_NAMES;
  const { numKvHeads, headDim, vocabSize } = config;
  const architecture = architectureOf(config.modelType);
  if (architecture === undefined) throw new TypeError(`no architecture facts for ${config.modelType}`);
  const piece = new GraphPiece();
  const positions = lazy(() => addPositions(piece, config));
  const input: OnnxValueInfo[] = [
    valueInfo(tokenIds, 'int64', ['batch', 'tokens']),
    valueInfo(seqlensK, 'int32', ['batch']),
    valueInfo(totalSequenceLength, 'int32', []),
  ];
  const output: OnnxValueInfo[] = [valueInfo(logits, 'float32', ['batch', 'tokens', vocabSize])];
  addEmbedding(piece, config, layout, tokenIds, positions, 'embedded');
  let residual: Residual = { hidden: 'embedded' };
  for (const [layer, weights] of layout.layers.entries()) {
    const context = { piece, config, architecture, prefix: `layer_${layer}` };
    const { sum, normalized } = addNormalization(context, 'input', residual, weights.inputNorm);
    const prefix = `${context.prefix}.`;
    const names = { query: `${prefix}query`, key: `${prefix}key`, value: `${prefix}value` };
    addQkv(context, weights, normalized, names);
    const attended = addAttention(context, layout, layer, names, positions);
    for (const part of ['key', 'value'] as const) {
      input.push(valueInfo(past(layer, part), 'float32', ['batch', numKvHeads, 'past_tokens', headDim]));
      output.push(valueInfo(present(layer, part), 'float32', ['batch', numKvHeads, 'present_tokens', headDim]));
    }
    residual = addAfterAttention(context, weights, sum, attended);
  }
  addHead({ piece, config, architecture, prefix: 'head' }, layout, residual, 'logit_rows');
  const tokensShape = 'tokens_shape';
  const lastDim = piece.integers('vocab_size', [vocabSize]);
  piece.add(
    node('Shape', [tokenIds], [tokensShape]),
    node('Concat', [tokensShape, lastDim], ['logits_shape'], { axis: 0 }),
    node('Reshape', ['logit_rows', 'logits_shape'], [logits]),
  );
  return { name: 'uncut', node: piece.nodes, initializer: piece.initializers, input, output };
}

/** Rotary embedding and attention of one layer. Returns the name of its output, [B, S, numHeads * headDim]. */
function addAttention(
  context: LayerContext,
  layout: WeightLayout,
  layer: number,
  { query, key, value }: QkvNames,
  positions: () => string,
): string {
  const { piece, config, prefix } = context;
  const { numHeads, numKvHeads, headDim } = config;
  const { seqlensK, totalSequenceLength, past, present } = UNCUT_NAMES;
  const tableIndex = config.rotaryOfLayer[layer] ?? null;
  const table = tableIndex === null ? undefined : config.rotaryTables[tableIndex];
  const weights = tableIndex === null ? undefined : layout.rotary[tableIndex];
  let [rotatedQuery, rotatedKey] = [query, key];
  const tables: string[] = [];
  if (table !== undefined && weights !== undefined) {
    const [cos, sin] = [piece.weight(weights.cos), piece.weight(weights.sin)];
    if (table.short === null && table.dim % ROTARY_UNIT === 0 && headDim % ROTARY_UNIT === 0) {
      tables.push(cos, sin);
    } else {
      [rotatedQuery, rotatedKey] = [`${query}.rotated`, `${key}.rotated`];
      addRotary(context, query, rotatedQuery, numHeads, { dim: table.dim, positions: positions(), cos, sin });
      addRotary(context, key, rotatedKey, numKvHeads, { dim: table.dim, positions: positions(), cos, sin });
    }
  }
  const attributes: Record<string, AttributeValue> = { num_heads: numHeads, kv_num_heads: numKvHeads };
  if (tables.length > 0) Object.assign(attributes, { do_rotary: 1, rotary_interleaved: 0 });
  const window = config.windowTokens[layer] ?? 0;
  if (window > 0) attributes.local_window_size = window;
  if (config.attentionSoftcap !== null) attributes.softcap = { float: config.attentionSoftcap };
  if (config.attentionScale !== 1 / Math.sqrt(headDim)) attributes.scale = { float: config.attentionScale };
  const caches = [past(layer, 'key'), past(layer, 'value')];
  const inputs = [rotatedQuery, rotatedKey, value, ...caches, seqlensK, totalSequenceLength, ...tables];
  const attended = `${prefix}.attention`;
  const outputs = [attended, present(layer, 'key'), present(layer, 'value')];
  piece.add(node('GroupQueryAttention', inputs, outputs, attributes, MICROSOFT_DOMAIN));
  return attended;
}

/**
 * Position of every new token, [B, S]: the last S of seqlens_k + 1, or from 0 on in a first prompt, which may be padded
 * on its right. Where short sequences have a table of their own, theirs are positions in that.
 */
function addPositions(piece: GraphPiece, config: ModelConfig): string {
  const { tokenIds, seqlensK, totalSequenceLength } = UNCUT_NAMES;
  const [zero, one] = [piece.integers('zero', [0], []), piece.integers('one', [1], [])];
  piece.add(
    node('Shape', [tokenIds], ['new_tokens_shape'], { start: 1, end: 2 }),
    node('Squeeze', ['new_tokens_shape'], ['new_tokens']),
    node('Cast', [seqlensK], ['last_positions'], { to: INT64_TYPE }),
    node('Sub', ['last_positions', 'new_tokens'], ['positions_before']),
    node('Add', ['positions_before', one], ['first_positions_padded']),
    node('Max', ['first_positions_padded', zero], ['first_positions']),
    node('Unsqueeze', ['first_positions', piece.integers('axis_1', [1])], ['first_positions_column']),
    node('Range', [zero, 'new_tokens', one], ['token_offsets']),
    node('Add', ['first_positions_column', 'token_offsets'], ['positions']),
  );
  const short = config.rotaryTables[0]?.short ?? null;
  if (short === null) return 'positions';
  const limit = piece.integers('short_tokens', [short.numTokens], []);
  const offset = piece.integers('short_offset', [config.contextLength], []);
  piece.add(
    node('Cast', [totalSequenceLength], ['total_tokens'], { to: INT64_TYPE }),
    node('LessOrEqual', ['total_tokens', limit], ['is_short']),
    node('Where', ['is_short', offset, zero], ['table_offset']),
    node('Add', ['positions', 'table_offset'], ['table_positions']),
  );
  return 'table_positions';
}

/** Computes once, with the first call. */
function lazy(compute: () => string): () => string {
  let value: string | undefined;
  return () => {
    value ??= compute();
    return value;
  };
}
