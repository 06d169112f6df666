/**
 * Owns the rows of the attention kernel: KV bytes per second over a bare read of the same bytes, and the same attention
 * against ONNX Runtime's GroupQueryAttention.
 *
 * Invariants
 * 1. The kernel is measured by its own bench/read-bandwidth.mjs, in a process of its own.
 * 2. Against GroupQueryAttention both see as many tokens and KV heads; ours reads them as float16, the operator, which
 *    takes no float16 KV with float32 queries, as float32, in whichever of its two ways is faster: KV copied to a new
 *    output, or appended in place.
 */
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ROOT_DIRECTORY } from '@lamina/cli';
import type { Context } from '../context.ts';
import { runScript } from '../processes.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';
import type { Pair } from '../statistics.ts';

const READ_BANDWIDTH = join(ROOT_DIRECTORY, 'packages/attention-kernel/bench/read-bandwidth.mjs');
const OPERATOR = fileURLToPath(new URL('../peers/group-query-attention.js', import.meta.url));
const LINE = /head_dim (\d+) group (\d+) threads (\d+): decode ([\d.]+) GB\/s, bare read ([\d.]+) GB\/s/g;
const CONTEXT_TOKENS = 4096;
const FLOAT16_BYTES = 2;

export interface KernelCase {
  readonly headDim: number;
  readonly group: number;
  readonly threads: number;
}

export interface KernelFigures {
  /** Gigabytes of float16 KV per second. */
  readonly decode: number;
  readonly bareRead: number;
}

/** Figures of one run of the kernel's bench, in the order of `cases`. @throws Error when one is missing. */
export async function readKernelFigures(
  cases: readonly KernelCase[],
  options: { readonly mib: number; readonly rounds: number },
): Promise<KernelFigures[]> {
  const list = (of: (each: KernelCase) => number): string => [...new Set(cases.map(of))].join(',');
  const text = await runScript(READ_BANDWIDTH, [
    ...['--dims', list(({ headDim }) => headDim), '--groups', list(({ group }) => group)],
    ...['--threads', list(({ threads }) => threads), '--context', String(CONTEXT_TOKENS)],
    ...['--mib', String(options.mib), '--rounds', String(options.rounds)],
  ]);
  const found = [...text.matchAll(LINE)].map((match) => match.slice(1).map(Number));
  return cases.map(({ headDim, group, threads }) => {
    const figures = found.find(([dim, heads, cores]) => dim === headDim && heads === group && cores === threads);
    if (figures === undefined) throw new Error(`no figure for head_dim ${headDim} group ${group}: ${text.slice(-400)}`);
    return { decode: figures[3]!, bareRead: figures[4]! };
  });
}

/** Millions of (token, KV head) per second. */
const millionsOf = (gigabytes: number, headDim: number): number => (1000 * gigabytes) / (2 * headDim * FLOAT16_BYTES);

async function readOperatorFigure({ headDim, group, threads }: KernelCase, rounds: number): Promise<number> {
  const text = await runScript(OPERATOR, [headDim, group, threads, CONTEXT_TOKENS, rounds].map(String));
  const value = Number(text.trim());
  if (!(value > 0)) throw new Error(`GroupQueryAttention gave no figure: ${text}`);
  return value;
}

export async function kernel(context: Context): Promise<Row[]> {
  const dims = context.isQuick ? [64] : [64, 128];
  const groups = [1, 4, 8];
  const cores = [...new Set([1, Math.min(2, context.threads)])];
  const cases = dims.flatMap((headDim) =>
    groups.flatMap((group) => cores.map((threads): KernelCase => ({ headDim, group, threads }))),
  );
  const nameOf = ({ headDim, group, threads }: KernelCase): string =>
    `head_dim ${headDim}, group ${group}, ${threads === 1 ? 'one core' : `${threads} cores`}`;
  const names = [
    ...cases.map((each): RowName => {
      const mustReach = each.group <= 4 ? 0.8 : 0.5;
      return { part: 'kernel', name: nameOf(each), unit: 'GB/s', peerName: 'bare read', mustReach };
    }),
    ...cases.map((each): RowName => {
      const unit = 'M tokens x KV heads/s';
      return { part: 'kernel', name: nameOf(each), unit, peerName: 'GroupQueryAttention', mustReach: 3 };
    }),
  ];
  return measuredTogether(names, async () => {
    const overRead: Pair[][] = cases.map(() => []);
    const overOperator: (Pair[] | Error)[] = cases.map(() => []);
    for (let round = 0; round < Math.min(context.rounds, 3); round++) {
      context.say(`  round ${round + 1}`);
      const figures = await readKernelFigures(cases, { mib: context.isQuick ? 256 : 512, rounds: 3 });
      for (const [i, each] of cases.entries()) {
        const { decode, bareRead } = figures[i]!;
        overRead[i]!.push({ ours: decode, peer: bareRead });
        const pairs = overOperator[i]!;
        if (pairs instanceof Error) continue;
        try {
          pairs.push({ ours: millionsOf(decode, each.headDim), peer: await readOperatorFigure(each, 3) });
        } catch (cause) {
          overOperator[i] = cause instanceof Error ? cause : new Error(String(cause));
        }
      }
    }
    return [
      ...overRead.map((runs) => ({ runs })),
      ...overOperator.map((runs) => (runs instanceof Error ? runs : { runs })),
    ];
  });
}
