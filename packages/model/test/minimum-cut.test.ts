/** The minimum cut of a graph of values: least cost, and of equal ones the cut nearest to the sinks. */
import { describe, expect, it } from 'vitest';
import { minimumCut } from '../src/slicer/minimum-cut.ts';

type Edges = readonly (readonly [string, string])[];

function cut(costs: Record<string, number>, edges: Edges, sources: string[], sinks: string[]): string[] | undefined {
  const network = { costs: new Map(Object.entries(costs)), edges };
  return minimumCut({ ...network, sources: new Set(sources), sinks: new Set(sinks) });
}

describe('the minimum cut', () => {
  it('is the narrowest place', () => {
    const edges: Edges = [
      ['wide', 'narrow'],
      ['narrow', 'q'],
      ['narrow', 'k'],
    ];
    expect(cut({ wide: 9, narrow: 4, q: 3, k: 2 }, edges, ['wide'], ['q', 'k'])).toEqual(['narrow']);
    expect(cut({ wide: 9, narrow: 6, q: 3, k: 2 }, edges, ['wide'], ['q', 'k'])).toEqual(['q', 'k']);
  });

  it('is the one nearest to the sinks of those that cost the same', () => {
    const edges: Edges = [
      ['a', 'b'],
      ['b', 'c'],
    ];
    expect(cut({ a: 4, b: 4, c: 4 }, edges, ['a'], ['c'])).toEqual(['c']);
  });

  it('goes through several paths', () => {
    const edges: Edges = [
      ['x', 'residual'],
      ['x', 'skip'],
      ['residual', 'sum'],
      ['skip', 'sum'],
    ];
    expect(cut({ x: 9, residual: 2, skip: 3, sum: 8 }, edges, ['x'], ['sum'])).toEqual(['residual', 'skip']);
  });

  it('does not exist where nothing may be cut', () => {
    expect(cut({ a: Number.POSITIVE_INFINITY }, [], ['a'], ['a'])).toBeUndefined();
  });
});
