/**
 * Owns the minimum cut of a graph of values (max-flow), weighted by what a value costs to carry.
 *
 * Invariants
 * 1. Of several minimum cuts the one nearest to the sinks is taken, so as little as possible is computed twice.
 */
import type { SearchContext } from './attention-operators.ts';
import type { DecoderGraph, GraphNode } from './decoder-graph.ts';
import { sizeOf } from './values.ts';

export interface ValueNetwork {
  /** What each value costs to cut; Infinity = must not be cut. */
  readonly costs: ReadonlyMap<string, number>;
  /** From a value to one that is computed of it. */
  readonly edges: readonly (readonly [string, string])[];
  readonly sources: ReadonlySet<string>;
  readonly sinks: ReadonlySet<string>;
}

interface Arc {
  readonly to: number;
  capacity: number;
  readonly back: number;
}

/** Names of the values to cut, or undefined if there is no cut of finite cost. */
export function minimumCut({ costs, edges, sources, sinks }: ValueNetwork): string[] | undefined {
  const names = [...costs.keys()];
  // A value is two vertices, 2i and 2i + 1, joined by an arc of its cost.
  const index = new Map(names.map((name, i) => [name, 2 * i]));
  const [source, sink] = [2 * names.length, 2 * names.length + 1];
  const arcs: Arc[][] = Array.from({ length: 2 * names.length + 2 }, () => []);
  const connect = (from: number, to: number, capacity: number): void => {
    const [out, back] = [arcs[from], arcs[to]];
    if (out === undefined || back === undefined) return;
    out.push({ to, capacity, back: back.length });
    back.push({ to: from, capacity: 0, back: out.length - 1 });
  };
  for (const [name, cost] of costs) {
    const at = index.get(name) ?? 0;
    connect(at, at + 1, cost);
    if (sources.has(name)) connect(source, at, Number.POSITIVE_INFINITY);
    if (sinks.has(name)) connect(at + 1, sink, Number.POSITIVE_INFINITY);
  }
  for (const [from, to] of edges) {
    const [a, b] = [index.get(from), index.get(to)];
    if (a !== undefined && b !== undefined) connect(a + 1, b, Number.POSITIVE_INFINITY);
  }
  while (true) {
    const path = shortestPath(arcs, source, sink);
    if (path === undefined) break;
    const flow = path.reduce((least, arc) => Math.min(least, arc.capacity), Number.POSITIVE_INFINITY);
    if (flow === Number.POSITIVE_INFINITY) return undefined;
    for (const arc of path) {
      arc.capacity -= flow;
      const back = arcs[arc.to]?.[arc.back];
      if (back !== undefined) back.capacity += flow;
    }
  }
  const reaches = reaching(arcs, sink);
  return names.filter((name) => {
    const at = index.get(name) ?? 0;
    return !reaches.has(at) && reaches.has(at + 1);
  });
}

function shortestPath(arcs: readonly Arc[][], source: number, sink: number): Arc[] | undefined {
  const via = new Map<number, { from: number; arc: Arc }>();
  const queue = [source];
  for (let at = 0; at < queue.length && !via.has(sink); at++) {
    const from = queue[at] ?? 0;
    for (const arc of arcs[from] ?? []) {
      if (arc.capacity <= 0 || via.has(arc.to) || arc.to === source) continue;
      via.set(arc.to, { from, arc });
      queue.push(arc.to);
    }
  }
  const path: Arc[] = [];
  for (let step = via.get(sink); step !== undefined; step = via.get(step.from)) path.push(step.arc);
  return path.length === 0 ? undefined : path;
}

/** Vertices from which the sink can still be reached. */
function reaching(arcs: readonly Arc[][], sink: number): Set<number> {
  const found = new Set([sink]);
  const queue = [sink];
  for (let at = queue.pop(); at !== undefined; at = queue.pop()) {
    for (const arc of arcs[at] ?? []) {
      const forward = arcs[arc.to]?.[arc.back];
      if (forward === undefined || forward.capacity <= 0 || found.has(arc.to)) continue;
      found.add(arc.to);
      queue.push(arc.to);
    }
  }
  return found;
}

/** True for a node that reads a weight matrix: it stays where the weights are, and is computed once. */
export function readsWeights(graph: DecoderGraph, node: GraphNode): boolean {
  return node.inputs.some((name) => {
    const maker = graph.maker(name);
    // The matrix itself, or what becomes of it on the way: dequantized, turned, widened.
    const source = maker !== undefined && OF_WEIGHTS.has(maker.opType) ? (maker.inputs[0] ?? '') : name;
    const dims = graph.initializers.get(source)?.dims ?? [];
    return dims.filter((dim) => dim > 1).length >= 2;
  });
}

const OF_WEIGHTS: ReadonlySet<string> = new Set(['Transpose', 'DequantizeLinear', 'Cast']);

/**
 * The minimum cut between all weights and the region of an attention must exist and cost no more than Q, K and V: the
 * region then holds no weights, and Q, K and V are all that it takes.
 */
export function checkMinimumCut(
  { graph, run }: SearchContext,
  region: readonly GraphNode[],
  end: GraphNode,
  entries: readonly string[],
): void {
  const inside = new Set(region);
  const costs = new Map<string, number>();
  const edges: [string, string][] = [];
  const sources = new Set<string>();
  const open = [...entries];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (costs.has(name)) continue;
    const value = run.evaluation.find(name);
    costs.set(name, value === undefined ? Number.POSITIVE_INFINITY : sizeOf(value.dims));
    const maker = graph.maker(name);
    if (maker === undefined || readsWeights(graph, maker) || maker.domain === 'lamina') {
      sources.add(name);
      continue;
    }
    for (const input of maker.inputs) {
      if (input === '' || graph.initializers.has(input) || run.evaluation.find(input)?.numbers()) continue;
      edges.push([input, name]);
      open.push(input);
    }
  }
  const cut = minimumCut({ costs, edges, sources, sinks: new Set(entries) });
  const holdsWeights = [...inside].some((node) => readsWeights(graph, node));
  const cost = (names: readonly string[]): number => names.reduce((sum, name) => sum + (costs.get(name) ?? 0), 0);
  if (cut === undefined || holdsWeights || cost(cut) > cost(entries)) {
    throw graph.refuse(end, 'no cut separates its cache from the weights', 'use the checkpoint itself');
  }
}
