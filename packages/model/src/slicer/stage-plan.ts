/**
 * Owns deciding where a decoder is cut: which stage each value belongs to and what is carried from one to the next.
 *
 * Invariants
 * 1. Stage l makes Q, K and V of attention l; what depends on its output belongs to stage l + 1 or a later one.
 * 2. What is carried over a boundary is a minimum cut between the weights that are read before it and what is used after
 *    it: normally the residual alone. What Q, K and V do not need is computed after the boundary (the MLP of a parallel
 *    block). Values that depend on positions only are never carried, but computed where needed.
 */
import type { AttentionSite } from './attention-site.ts';
import { type DecoderGraph, type GraphNode, SUPPORTED_FORMS } from './decoder-graph.ts';
import { isFloating } from './element-types.ts';
import type { Evaluation } from './evaluate.ts';
import { minimumCut, readsWeights } from './minimum-cut.ts';
import { roleOf, SAMPLES } from './samples.ts';
import { sizeOf } from './values.ts';

export interface StagePlan {
  readonly sites: readonly AttentionSite[];
  readonly logits: string;
  /** [numLayers]: values carried from stage l to stage l + 1, in the order in which they lie side by side. */
  readonly carried: readonly (readonly string[])[];
  /** [numLayers]: elements of each of them per token. */
  readonly carriedWidths: readonly (readonly number[])[];
  /** Stage of every value that depends on the tokens; others have none. */
  readonly stageOf: ReadonlyMap<string, number>;
}

/** @param evaluation Of the graph with its sites, for the first of the samples. */
export function planStages(
  graph: DecoderGraph,
  sites: readonly AttentionSite[],
  logits: string,
  evaluation: Evaluation,
): StagePlan {
  const ordered = graph.nodes.flatMap((node) => sites.filter((site) => site.node === node));
  const stageOf = stagesOfValues(graph, ordered, evaluation);
  for (const [layer, { node, origin }] of ordered.entries()) {
    const stages = node.inputs.map((name) => stageOf.get(name) ?? -1);
    if (Math.max(...stages) !== layer) {
      throw graph.refuse(origin, 'does not depend on the attention before it (parallel attention)', SUPPORTED_FORMS);
    }
  }
  if (stageOf.get(logits) !== ordered.length) {
    throw graph.refuse(graph.maker(logits), 'the logits do not depend on the last attention', SUPPORTED_FORMS);
  }
  const live = liveNodes(graph, logits, stageOf);
  const carried: string[][] = [];
  const early = new Set<GraphNode>();
  for (const [stage, { node }] of ordered.entries()) {
    addAncestors(graph, node, early);
    const crossing = crossingValues(live, stageOf, stage, logits);
    const previous = new Set(carried.at(-1) ?? []);
    carried.push(cutBoundary(graph, evaluation, stageOf, { crossing, previous, early }));
  }
  const [{ tokens } = { tokens: 1 }] = SAMPLES;
  const carriedWidths = carried.map((names) => names.map((name) => sizeOf(evaluation.value(name).dims) / tokens));
  for (const [i, names] of carried.entries()) {
    for (const name of names) checkRows(graph, evaluation, name, tokens, i);
  }
  return { sites: ordered, logits, carried, carriedWidths, stageOf };
}

/** Stage of each value that depends on the tokens. What can be evaluated does not, whatever it is computed of. */
function stagesOfValues(
  graph: DecoderGraph,
  sites: readonly AttentionSite[],
  evaluation: Evaluation,
): Map<string, number> {
  const stages = new Map<string, number>();
  const layerOf = new Map(sites.map((site, layer) => [site.node, layer]));
  for (const input of graph.inputs) if (roleOf(graph, input) === 'tokenIds') stages.set(input.name, 0);
  for (const node of graph.nodes) {
    const layer = layerOf.get(node);
    const own = Math.max(-1, ...node.inputs.map((name) => stages.get(name) ?? -1));
    if (own < 0) continue;
    for (const output of node.outputs) {
      if (output === '' || evaluation.find(output)?.numbers()) continue;
      stages.set(output, layer === undefined ? own : layer + 1);
    }
  }
  return stages;
}

/** Nodes that the logits need. */
function liveNodes(graph: DecoderGraph, logits: string, stageOf: ReadonlyMap<string, number>): Set<GraphNode> {
  const live = new Set<GraphNode>();
  const open = [logits];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    const maker = stageOf.has(name) ? graph.maker(name) : undefined;
    if (maker === undefined || live.has(maker)) continue;
    live.add(maker);
    open.push(...maker.inputs);
  }
  return live;
}

/** Values of stages up to `stage` that later stages use. */
function crossingValues(
  live: ReadonlySet<GraphNode>,
  stageOf: ReadonlyMap<string, number>,
  stage: number,
  logits: string,
): Set<string> {
  const crossing = new Set<string>();
  for (const node of live) {
    // A site's own inputs go to the shards, not over the boundary, unless they were made earlier.
    const isSite = node.domain === 'lamina';
    const used = Math.max(...node.outputs.map((output) => stageOf.get(output) ?? -1)) - (isSite ? 1 : 0);
    if (used <= stage) continue;
    for (const input of node.inputs) if ((stageOf.get(input) ?? Number.POSITIVE_INFINITY) <= stage) crossing.add(input);
  }
  if ((stageOf.get(logits) ?? 0) <= stage) crossing.add(logits);
  return crossing;
}

interface Boundary {
  readonly crossing: ReadonlySet<string>;
  /** What the boundary before carries. */
  readonly previous: ReadonlySet<string>;
  /** Nodes that Q, K and V need up to here: they are computed before the boundary. Others can wait. */
  readonly early: ReadonlySet<GraphNode>;
}

function addAncestors(graph: DecoderGraph, from: GraphNode, into: Set<GraphNode>): void {
  const open = [from];
  for (let node = open.pop(); node !== undefined; node = open.pop()) {
    if (into.has(node)) continue;
    into.add(node);
    for (const input of node.inputs) {
      const maker = graph.maker(input);
      if (maker !== undefined) open.push(maker);
    }
  }
}

function cutBoundary(
  graph: DecoderGraph,
  evaluation: Evaluation,
  stageOf: ReadonlyMap<string, number>,
  { crossing, previous, early }: Boundary,
): string[] {
  const costs = new Map<string, number>();
  const edges: [string, string][] = [];
  const sources = new Set<string>();
  const open = [...crossing];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (costs.has(name)) continue;
    const { dataType, dims } = evaluation.value(name);
    costs.set(name, isFloating(dataType) ? sizeOf(dims) : Number.POSITIVE_INFINITY);
    const maker = graph.maker(name);
    const isSource =
      maker === undefined || maker.domain === 'lamina' || (early.has(maker) && readsWeights(graph, maker));
    if (isSource || previous.has(name)) {
      sources.add(name);
      continue;
    }
    for (const input of maker.inputs) {
      if (!stageOf.has(input)) continue;
      edges.push([input, name]);
      open.push(input);
    }
  }
  const cut = minimumCut({ costs, edges, sources, sinks: crossing });
  if (cut === undefined || cut.length === 0) {
    const names = [...crossing].slice(0, 4).join(', ');
    throw graph.refuse(
      graph.maker([...crossing][0] ?? ''),
      `no cut of float values separates '${names}' from the stages before`,
      SUPPORTED_FORMS,
    );
  }
  return cut;
}

/** A carried value must be rows of tokens. */
function checkRows(graph: DecoderGraph, evaluation: Evaluation, name: string, tokens: number, layer: number): void {
  const { dims } = evaluation.value(name);
  if (dims.find((dim) => dim !== 1) === tokens) return;
  const problem = `'${name}' [${dims}], which is carried past attention ${layer}, is not rows of tokens`;
  throw graph.refuse(graph.maker(name), problem, SUPPORTED_FORMS);
}
