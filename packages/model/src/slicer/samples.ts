/**
 * Owns the runs of a decoder graph that it is evaluated for: how its inputs look for `tokens` new tokens of one request
 * with `past` tokens in its cache.
 *
 * Invariants
 * 1. An input is fed by what it is: an integer by its name's meaning, a float of rank 4 or 5 as cache. Any other input
 *    is refused by name.
 */
import type { DecoderGraph, GraphInput, GraphNode } from './decoder-graph.ts';
import { isFloating, TYPE } from './element-types.ts';
import { Evaluation } from './evaluate.ts';
import { knownValue, shapeOnly, sizeOf, type Value } from './values.ts';

export interface Sample {
  readonly tokens: number;
  readonly past: number;
}

/** Value that added nodes use for the positions of the tokens, [1, T], whether or not the graph has such an input. */
export const POSITIONS = 'lamina.positions';

/** What an input of a decoder is; `cache` are keys and values. */
export type InputRole =
  | 'tokenIds'
  | 'positionIds'
  | 'attentionMask'
  | 'cache'
  | 'numLogits'
  | 'useCache'
  | 'pastLength'
  | 'totalLength';

export function roleOf(graph: DecoderGraph, input: GraphInput): InputRole {
  const { name, dataType, dims } = input;
  const isInteger = dataType === TYPE.int64 || dataType === TYPE.int32;
  const isCacheShaped = isFloating(dataType) && (dims.length === 4 || dims.length === 5);
  if (isCacheShaped && !/conv|recurrent|ssm/.test(name)) return 'cache';
  if (isInteger && dims.length === 2) {
    if (/input_ids|token_ids/.test(name)) return 'tokenIds';
    if (/position/.test(name)) return 'positionIds';
    if (/mask/.test(name)) return 'attentionMask';
  }
  if (isFloating(dataType) && dims.length === 2 && /mask/.test(name)) return 'attentionMask';
  if (isInteger && dims.length <= 1 && /num_logits_to_keep|logits_to_keep/.test(name)) return 'numLogits';
  if (isInteger && dims.length <= 2 && /past_seq_len|seqlens_k|cache_position/.test(name)) return 'pastLength';
  if (isInteger && dims.length <= 1 && /total_seq/.test(name)) return 'totalLength';
  if (dataType === TYPE.bool && /use_cache/.test(name)) return 'useCache';
  throw graph.refuse(
    undefined,
    `input '${name}' is of a kind that is not supported`,
    'use a text decoder whose inputs are token ids, an attention mask, position ids and a KV cache',
  );
}

/** The value of one input in a sample. */
function feedOf(graph: DecoderGraph, input: GraphInput, { tokens, past }: Sample): Value {
  const { dataType } = input;
  const filled = (dims: readonly number[], value: (i: number) => number): Value =>
    knownValue(
      dataType,
      dims,
      Float64Array.from({ length: sizeOf(dims) }, (_, i) => value(i)),
    );
  const role = roleOf(graph, input);
  if (role === 'tokenIds') return shapeOnly(dataType, [1, tokens]);
  if (role === 'positionIds') return filled([1, tokens], (i) => past + i);
  if (role === 'attentionMask') return filled([1, past + tokens], () => 1);
  if (role === 'numLogits') return filled(input.dims.length === 0 ? [] : [1], () => 0);
  if (role === 'useCache') return filled(input.dims.length === 0 ? [] : [1], () => 1);
  const lengths = input.dims.map(() => 1);
  // GroupQueryAttention's seqlens_k counts all tokens but one.
  if (role === 'pastLength') return filled(lengths, () => past + tokens - 1);
  if (role === 'totalLength') return filled(lengths, () => past + tokens);
  const pastAxis = input.dims.length - 2;
  const dims = input.dims.map((dim, i) => (i === pastAxis ? past : typeof dim === 'number' && dim > 0 ? dim : 1));
  return shapeOnly(dataType, dims);
}

export function evaluateSample(
  graph: DecoderGraph,
  sample: Sample,
  extra: ReadonlyMap<string, Value> = new Map(),
  nodes?: readonly GraphNode[],
): Evaluation {
  const feeds = new Map(graph.inputs.map((input) => [input.name, feedOf(graph, input, sample)]));
  const positions = Float64Array.from({ length: sample.tokens }, (_, i) => sample.past + i);
  feeds.set(POSITIONS, knownValue(TYPE.int64, [1, sample.tokens], positions));
  for (const [name, value] of extra) feeds.set(name, value);
  return new Evaluation(graph, feeds, nodes);
}

/** Runs that tell apart what depends on the tokens, on the cache and on neither. */
export const SAMPLES: readonly Sample[] = [
  { tokens: 13, past: 5 },
  { tokens: 14, past: 5 },
  { tokens: 13, past: 7 },
  { tokens: 17, past: 11 },
];
