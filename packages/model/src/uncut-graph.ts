/**
 * Owns the uncut decoder graph: the same layers with their attention in place (GroupQueryAttention), KV as tensors in
 * and out. It is the reference that the distributed system must equal.
 *
 * Invariants
 * 1. It reads the same weights file as the staged graph.
 */
import {
  addAfterAttention,
  addEmbedding,
  addHead,
  addNormalization,
  addQkv,
  GraphPiece,
  type Residual,
} from './decoder-layers.ts';
import type { ModelConfig } from './model-config.ts';
import { MICROSOFT_DOMAIN, node, type OnnxGraph, type OnnxValueInfo, valueInfo } from './onnx.ts';
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

export function buildUncutGraph(config: ModelConfig, layout: WeightLayout): OnnxGraph {
  const { tokenIds, seqlensK, totalSequenceLength, logits, past, present } = UNCUT_NAMES;
  const { numHeads, numKvHeads, headDim, vocabSize } = config;
  const piece = new GraphPiece();
  const input: OnnxValueInfo[] = [
    valueInfo(tokenIds, 'int64', ['batch', 'tokens']),
    valueInfo(seqlensK, 'int32', ['batch']),
    valueInfo(totalSequenceLength, 'int32', []),
  ];
  const output: OnnxValueInfo[] = [valueInfo(logits, 'float32', ['batch', 'tokens', vocabSize])];
  addEmbedding(piece, layout, tokenIds, 'embedded');
  let residual: Residual = { hidden: 'embedded' };
  for (const [layer, weights] of layout.layers.entries()) {
    const context = { piece, config, prefix: `layer_${layer}` };
    const { sum, normalized } = addNormalization(context, 'input', residual, weights.inputNorm);
    const { query, key, value } = addQkv(context, weights, normalized);
    const caches = [past(layer, 'key'), past(layer, 'value')];
    const tables = [piece.weight(layout.cos), piece.weight(layout.sin)];
    const attended = `${context.prefix}.attention`;
    piece.add(
      node(
        'GroupQueryAttention',
        [query, key, value, ...caches, seqlensK, totalSequenceLength, ...tables],
        [attended, present(layer, 'key'), present(layer, 'value')],
        { num_heads: numHeads, kv_num_heads: numKvHeads, do_rotary: 1, rotary_interleaved: 0 },
        MICROSOFT_DOMAIN,
      ),
    );
    for (const part of ['key', 'value'] as const) {
      input.push(valueInfo(past(layer, part), 'float32', ['batch', numKvHeads, 'past_tokens', headDim]));
      output.push(valueInfo(present(layer, part), 'float32', ['batch', numKvHeads, 'present_tokens', headDim]));
    }
    residual = addAfterAttention(context, weights, sum, attended);
  }
  addHead({ piece, config, prefix: 'head' }, layout, residual, 'logit_rows');
  const tokensShape = 'tokens_shape';
  const lastDim = piece.integers('vocab_size', [vocabSize]);
  piece.add(
    node('Shape', [tokenIds], [tokensShape]),
    node('Concat', [tokensShape, lastDim], ['logits_shape'], { axis: 0 }),
    node('Reshape', ['logit_rows', 'logits_shape'], [logits]),
  );
  return { name: 'uncut', node: piece.nodes, initializer: piece.initializers, input, output };
}
