/**
 * Owns the slicer: a published decoder graph in, its attention spec and its staged graph out.
 *
 * Invariants
 * 1. Every cache input is read by an attention that was found and replaced; one that is not is refused by name.
 * 2. Head shapes are the same in all layers; scales that differ are folded into Q.
 */
import type { AttentionSpec } from '@lamina/tensor';
import type { OnnxGraph } from '../onnx.ts';
import { replaceOperators, type SearchContext } from './attention-operators.ts';
import { type AttentionSite, SITE_DOMAIN, type SiteFacts } from './attention-site.ts';
import { DecoderGraph, newNode, SUPPORTED_FORMS } from './decoder-graph.ts';
import { TYPE } from './element-types.ts';
import type { EvaluatedRuns } from './leaf-writer.ts';
import { joinChosenTables, type ShortSequences } from './length-choice.ts';
import type { PublishedFile } from './onnx-file.ts';
import { evaluateSample, roleOf, SAMPLES, type Sample } from './samples.ts';
import { planStages, type StagePlan } from './stage-plan.ts';
import { type PlaceTensor, type StagedShape, writeStagedGraph } from './staged-writer.ts';
import { sizeOf } from './values.ts';
import { replaceWritten } from './written-attention.ts';

export interface SlicedDecoder {
  readonly graph: DecoderGraph;
  readonly attention: AttentionSpec;
  /** Null: requests of all lengths are fed alike. */
  readonly shortSequences: ShortSequences | null;
  readonly shape: StagedShape;
  readonly plan: StagePlan;
  /** Writes the staged graph; `place` says where the data of each tensor lies. */
  stagedGraph(place: PlaceTensor): OnnxGraph;
}

const MIN_OPSET = 11;
const MAX_LONG_PAST = 16 * 1024;

/**
 * @param windowHint Sliding window that the configuration names, in tokens; masks are read with more cache than that.
 * @param contextLength Longest sequence: some masks are tables of that size.
 */
export function sliceDecoder(file: PublishedFile, windowHint: number, contextLength: number): SlicedDecoder {
  const graph = new DecoderGraph(file);
  if (graph.opset('') < MIN_OPSET)
    throw graph.refuse(undefined, `opset ${graph.opset('')} is too old`, SUPPORTED_FORMS);
  const shortSequences = joinChosenTables(graph, contextLength);
  const longSample: Sample = { tokens: 2, past: longPastOf(windowHint, contextLength) };
  const [sample] = SAMPLES;
  if (sample === undefined) throw new TypeError('no samples');
  const context: SearchContext = {
    graph,
    run: { sample, evaluation: evaluateSample(graph, sample) },
    longRun: { sample: longSample, evaluation: evaluateSample(graph, longSample) },
  };
  const sites = [...replaceOperators(context), ...replaceWritten(context)];
  const logits = logitsOf(graph, context);
  checkCaches(graph, sites);
  const attention = attentionSpec(graph, sites);
  const evaluations = SAMPLES.map((each) => evaluateSample(graph, each));
  const [evaluation] = evaluations;
  if (evaluation === undefined) throw new TypeError('no samples');
  const longest: Sample = { tokens: sample.tokens, past: Math.max(0, contextLength - sample.tokens) };
  const runs: EvaluatedRuns = {
    samples: SAMPLES,
    evaluations,
    longest: { sample: longest, evaluation: evaluateSample(graph, longest) },
  };
  const plan = planStages(graph, sites, logits, evaluation);
  const vocabSize = evaluation.value(logits).dims.at(-1) ?? 0;
  if (sizeOf(evaluation.value(logits).dims) !== vocabSize * sample.tokens) {
    const problem = `logits '${logits}' [${evaluation.value(logits).dims}] are not of every token`;
    throw graph.refuse(graph.maker(logits), problem, 'use an export that gives the logits of all tokens');
  }
  const shape: StagedShape = {
    hiddenSize: Math.max(...plan.carriedWidths.map((widths) => widths.reduce((a, b) => a + b, 0))),
    queryWidth: attention.numHeads * attention.headDim,
    kvWidth: attention.numKvHeads * attention.headDim,
    vocabSize,
  };
  return {
    graph,
    attention,
    shortSequences,
    shape,
    plan,
    stagedGraph: (place) => writeStagedGraph({ graph, runs, plan, shape, place }),
  };
}

function longPastOf(windowHint: number, contextLength: number): number {
  return Math.max(1, Math.min(Math.max(windowHint, 1024) + 8, MAX_LONG_PAST, contextLength - 2));
}

/** The output that is no cache: named logits, or the only one of rank 3. */
function logitsOf(graph: DecoderGraph, { run }: SearchContext): string {
  const candidates = graph.outputs.filter((name) => run.evaluation.find(name)?.dims.length === 3);
  const logits = candidates.find((name) => name === 'logits') ?? candidates[0];
  if (logits === undefined) {
    const [first = ''] = graph.outputs;
    // If there are some, but behind a node that cannot be evaluated, it is that node's fault.
    run.evaluation.value(first);
    throw graph.refuse(graph.maker(first), 'the graph has no logits [batch, tokens, vocabulary]', SUPPORTED_FORMS);
  }
  return logits;
}

function checkCaches(graph: DecoderGraph, sites: readonly AttentionSite[]): void {
  const read = new Set<string>();
  const open = sites.flatMap((site) => [...site.origin.inputs]);
  const seen = new Set<string>();
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (seen.has(name)) continue;
    seen.add(name);
    if (graph.input(name) !== undefined) read.add(name);
    open.push(...(graph.maker(name)?.inputs ?? []));
  }
  const caches = graph.inputs.filter((input) => roleOf(graph, input) === 'cache');
  const missed = caches.find(({ name }) => !read.has(name));
  if (missed !== undefined) {
    const problem = `no attention reads the cache '${missed.name}'`;
    throw graph.refuse(graph.users(missed.name)[0], problem, SUPPORTED_FORMS);
  }
  if (sites.length === 0) {
    const problem =
      'has no attention with a KV cache: no GroupQueryAttention, MultiHeadAttention, Attention, nor products and a softmax over a cache';
    throw graph.refuse(undefined, problem, 'use a decoder that was exported with past key values');
  }
}

function attentionSpec(graph: DecoderGraph, sites: AttentionSite[]): AttentionSpec {
  const order = new Map(graph.nodes.map((node, i) => [node, i]));
  sites.sort((a, b) => (order.get(a.node) ?? 0) - (order.get(b.node) ?? 0));
  const [first] = sites;
  if (first === undefined) throw new TypeError('no sites');
  const { facts } = first;
  for (const site of sites) {
    const same = ['numHeads', 'numKvHeads', 'headDim', 'softcap'] as const;
    for (const name of same) {
      const [own, other] = [site.facts[name], facts[name]];
      if (Math.abs(own - other) > 1e-4 * Math.abs(other)) {
        throw graph.refuse(
          site.origin,
          `${name} is ${own}, in the first layer ${other}: layers that differ are not supported`,
          SUPPORTED_FORMS,
        );
      }
    }
    if (site.facts.alibiSlopes?.join() !== facts.alibiSlopes?.join()) {
      throw graph.refuse(site.origin, 'its ALiBi slopes are not those of the first layer', SUPPORTED_FORMS);
    }
    if (site.facts.scale !== facts.scale) foldScale(graph, site, site.facts.scale / facts.scale);
  }
  const all = sites.map((site) => site.facts);
  return {
    numLayers: sites.length,
    numHeads: facts.numHeads,
    numKvHeads: facts.numKvHeads,
    headDim: facts.headDim,
    scale: facts.scale,
    ...(facts.softcap === 0 ? {} : { softcap: facts.softcap }),
    ...(all.some(({ windowTokens }) => windowTokens > 0) ? { windowTokens: all.map((own) => own.windowTokens) } : {}),
    ...(facts.alibiSlopes === undefined ? {} : { alibiSlopes: facts.alibiSlopes }),
    ...sinksOf(all),
  };
}

function sinksOf(all: readonly SiteFacts[]): Pick<AttentionSpec, 'sinkLogits'> {
  if (all.every(({ sinkLogits }) => sinkLogits === undefined)) return {};
  // A logit of -1e30 takes no weight away.
  return { sinkLogits: all.map((own) => own.sinkLogits ?? Array.from({ length: own.numHeads }, () => -1e30)) };
}

/** Multiplies a layer's Q, so that the common scale gives what its own would. */
function foldScale(graph: DecoderGraph, site: AttentionSite, factor: number): void {
  const { node } = site;
  const [query = ''] = node.inputs;
  const scaled = graph.fresh('scaled_query');
  const multiply = newNode('Mul', [query, graph.constant('scale', TYPE.float, [factor], [])], [scaled]);
  node.inputs[0] = scaled;
  if (node.domain !== SITE_DOMAIN) throw new TypeError('not a site');
  graph.replace(node, [multiply, node]);
}
