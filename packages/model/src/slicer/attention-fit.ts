/**
 * Owns finding out by calculation what an attention that is written out computes: numbers are put into its region of
 * the graph, and scale, soft-cap, mask and the sharing of KV heads are read off the result.
 *
 * Invariants
 * 1. What was read off is checked: the region's output must equal that of plain attention with these facts. So no form
 *    of writing it down is trusted, and none is needed in advance.
 */
import { type BiasAt, biasOf, type MaskFacts, readMask } from './attention-mask.ts';
import type { SiteFacts } from './attention-site.ts';
import type { DecoderGraph, GraphNode } from './decoder-graph.ts';
import { Evaluation } from './evaluate.ts';
import type { Sample } from './samples.ts';
import { knownValue, lazyValue, sizeOf, type Value } from './values.ts';

/** The part of a graph between Q, K, V with the cache and the attention's output. */
export interface Region {
  /** In topological order. */
  readonly nodes: readonly GraphNode[];
  readonly query: string;
  readonly newKey: string;
  readonly newValue: string;
  /** The graph's inputs or what is cut out of them: what newKey and newValue are appended to. */
  readonly pastKey: string;
  readonly pastValue: string;
  /** Output of the product of Q and K. */
  readonly scores: string;
  /** Input of the softmax. */
  readonly logits: string;
  readonly output: string;
  /** Outputs of Tanh nodes: a soft-cap, if there are any. */
  readonly tanhs: readonly string[];
}

export interface Head {
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
}

type FeedOf = (name: string) => Value | undefined;

const TOLERANCE = 1e-4;

/** Numbers that have nothing in common with any layout. */
function arbitrary(size: number, seed: number): Float64Array {
  return Float64Array.from({ length: size }, (_, i) => Math.sin((i + 1) * (seed + 0.7310585) * 12.9898) * 0.9);
}

/** Q, K and V of a region with arbitrary numbers, K and V also joined with the cache: [kvHeads][past + tokens][headDim]. */
class Trial {
  readonly feeds: Map<string, Value>;
  readonly #past: number;
  readonly #tokens: number;
  readonly #head: Head;

  constructor(region: Region, shapeOf: (name: string) => Value, sample: Sample, head: Head) {
    this.#past = sample.past;
    this.#tokens = sample.tokens;
    this.#head = head;
    const names = [region.query, region.newKey, region.newValue, region.pastKey, region.pastValue];
    this.feeds = new Map(
      names.map((name, seed) => {
        const { dataType, dims } = shapeOf(name);
        return [name, knownValue(dataType, dims, arbitrary(sizeOf(dims), seed))];
      }),
    );
  }

  joined(pastName: string, newName: string, kvHead: number, token: number, d: number): number {
    const isPast = token < this.#past;
    const rows = isPast ? this.#past : this.#tokens;
    const row = isPast ? token : token - this.#past;
    const numbers = this.feeds.get(isPast ? pastName : newName)?.numbers();
    return numbers?.[(kvHead * rows + row) * this.#head.headDim + d] ?? Number.NaN;
  }

  query(name: string, head: number, i: number, d: number): number {
    return this.feeds.get(name)?.numbers()?.[(head * this.#tokens + i) * this.#head.headDim + d] ?? Number.NaN;
  }
}

function evaluateRegion(
  graph: DecoderGraph,
  region: Region,
  own: ReadonlyMap<string, Value>,
  outer: FeedOf,
): Evaluation {
  const feeds = new Map(own);
  for (const name of region.nodes.flatMap((node) => node.inputs)) {
    const value = feeds.has(name) ? undefined : outer(name);
    if (value !== undefined && value.numbers() !== null) feeds.set(name, value);
  }
  return new Evaluation(graph, feeds, region.nodes);
}

function numbersOf(evaluation: Evaluation, name: string): Float64Array {
  const numbers = evaluation.value(name).numbers();
  if (numbers === null) throw new TypeError(`'${name}' cannot be evaluated`);
  return numbers;
}

/** The mask of a region: what is added to scores that are all zero. */
function maskOf(
  graph: DecoderGraph,
  region: Region,
  outer: Evaluation,
  sample: Sample,
  numHeads: number,
): { readonly facts: MaskFacts; readonly biasAt: BiasAt } {
  const { dataType, dims } = outer.value(region.scores);
  const zero = lazyValue(dataType, dims, () => new Float64Array(sizeOf(dims)));
  const evaluation = evaluateRegion(graph, region, new Map([[region.scores, zero]]), (name) => outer.find(name));
  const bias = evaluation.value(region.logits);
  const biasAt = biasOf(numbersOf(evaluation, region.logits), bias.dims, false);
  return { facts: readMask(biasAt, numHeads, sample, false), biasAt };
}

/** @throws Error that says what the region does that plain attention does not. */
export function fitAttention(
  graph: DecoderGraph,
  region: Region,
  runs: readonly { readonly sample: Sample; readonly evaluation: Evaluation }[],
  head: Head,
): SiteFacts {
  const [run, longRun] = runs;
  if (run === undefined || longRun === undefined) throw new TypeError('no runs');
  const { sample, evaluation: outer } = run;
  const mask = maskOf(graph, region, longRun.evaluation, longRun.sample, head.numHeads).facts;
  const { biasAt } = maskOf(graph, region, outer, sample, head.numHeads);
  const trial = new Trial(region, (name) => outer.value(name), sample, head);
  const evaluation = evaluateRegion(graph, region, trial.feeds, (name) => outer.find(name));
  const { numHeads, numKvHeads, headDim } = head;
  const total = sample.past + sample.tokens;
  const group = numHeads / numKvHeads;
  const rawAt = (h: number, i: number, j: number): number => {
    let dot = 0;
    for (let d = 0; d < headDim; d++) {
      const key = trial.joined(region.pastKey, region.newKey, Math.floor(h / group), j, d);
      dot += trial.query(region.query, h, i, d) * key;
    }
    return dot;
  };
  // Head 0, the first query and its own key, which every mask lets it see.
  const own = sample.past;
  const raw = rawAt(0, 0, own);
  const logit = (numbersOf(evaluation, region.logits)[own] ?? Number.NaN) - biasAt(0, 0, own);
  const tanhs = region.tanhs.map((name) => numbersOf(evaluation, name)[own] ?? Number.NaN);
  const [tanh] = tanhs;
  const softcap = tanh === undefined ? 0 : logit / tanh;
  const fitted = tanh === undefined ? logit / raw : (Math.atanh(tanh) * softcap) / raw;
  const usual = 1 / Math.sqrt(headDim);
  const facts: SiteFacts = {
    ...head,
    scale: Math.abs(fitted / usual - 1) < 1e-6 ? usual : fitted,
    softcap,
    ...mask,
    sinkLogits: undefined,
  };
  const output = numbersOf(evaluation, region.output);
  for (let h = 0; h < numHeads; h++) {
    for (let i = 0; i < sample.tokens; i++) {
      const weights = Array.from({ length: total }, (_, j) => weightAt(facts, h, sample.past + i, j, rawAt(h, i, j)));
      const sum = weights.reduce((a, b) => a + b, 0);
      for (let d = 0; d < headDim; d++) {
        const kv = Math.floor(h / group);
        const expected = weights.reduce(
          (mixed, weight, j) => mixed + (weight / sum) * trial.joined(region.pastValue, region.newValue, kv, j, d),
          0,
        );
        const found = output[(h * sample.tokens + i) * headDim + d] ?? Number.NaN;
        if (!(Math.abs(found - expected) < TOLERANCE)) {
          throw new TypeError(`it is not plain softmax attention (${found} where ${expected} was expected)`);
        }
      }
    }
  }
  return facts;
}

function weightAt(facts: SiteFacts, head: number, position: number, key: number, raw: number): number {
  if (key > position || (facts.windowTokens > 0 && position - key >= facts.windowTokens)) return 0;
  const scaled = raw * facts.scale;
  const capped = facts.softcap === 0 ? scaled : facts.softcap * Math.tanh(scaled / facts.softcap);
  return Math.exp(capped + (facts.alibiSlopes?.[head] ?? 0) * (key - position));
}

/**
 * Checks that K or V of a fused operator are cache and new rows, each KV head repeated for the heads that share it.
 * @param isRows The operand is [1, total, numHeads * headDim], else [1, numHeads, total, headDim].
 */
export function checkOperand(
  graph: DecoderGraph,
  region: Region,
  operand: string,
  part: 'key' | 'value',
  run: { readonly sample: Sample; readonly evaluation: Evaluation },
  head: Head,
  isRows: boolean,
): void {
  const trial = new Trial(region, (name) => run.evaluation.value(name), run.sample, head);
  const evaluation = evaluateRegion(graph, region, trial.feeds, (name) => run.evaluation.find(name));
  const numbers = numbersOf(evaluation, operand);
  const { numHeads, numKvHeads, headDim } = head;
  const total = run.sample.past + run.sample.tokens;
  const [past, own] = part === 'key' ? [region.pastKey, region.newKey] : [region.pastValue, region.newValue];
  for (let h = 0; h < numHeads; h++) {
    for (let j = 0; j < total; j++) {
      for (let d = 0; d < headDim; d++) {
        const at = isRows ? (j * numHeads + h) * headDim + d : (h * total + j) * headDim + d;
        const expected = trial.joined(past, own, Math.floor((h * numKvHeads) / numHeads), j, d);
        if (numbers[at] !== expected)
          throw new TypeError(`its ${part} is not the cache and the new ${part} side by side`);
      }
    }
  }
}
