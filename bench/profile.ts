/**
 * Owns reading CPU profiles of a dense-executor: time by cause.
 *
 * Invariants
 * 1. What has no file of its own (built-in functions, garbage collection) counts to whoever called it; native code that
 *    was called from nowhere is `native`.
 * 2. Waiting is no CPU time and is not counted, nor is what the profiler itself takes.
 * 3. The profiler samples by the clock, so a thread that another has put off its core is counted as if it ran. That happens where
 *    a message is sent, which wakes its receiver: native code of links counts by its own CPU clock, and what is left of a
 *    thread's CPU time is divided as its other samples are.
 * 4. CPU time is counted before the profiler runs: its signals interrupt every wait, and are handled in whatever they interrupt.
 */
import type { Profiler } from 'node:inspector';

export const CAUSES = ['machine', 'codec', 'nats', 'schedule', 'dense', 'sample', 'answer', 'other', 'native'] as const;
export type Cause = (typeof CAUSES)[number];

/** First match wins. Sockets are used by the NATS client only. */
const BY_URL: readonly (readonly [RegExp, Cause])[] = [
  [/xstate|\/request\/(machine|request|layer-cycle)/, 'machine'],
  [/onnxruntime|dense-session/, 'dense'],
  [/sampler/, 'sample'],
  [/msgpackr|packages\/protocol|packages\/tensor|tensor-exchange|wire-rows/, 'codec'],
  [
    /node_modules\/(nats|nkeys|tweetnacl)|packages\/bus|node:(net|stream|internal\/(stream|net))|node:internal\/streams/,
    'nats',
  ],
  [/packages\/model|\/request\//, 'answer'],
  [/services\/dense-executor|node:internal\/(worker|per_context)/, 'schedule'],
];

/** Starting and ending the profiler itself. */
const PROFILER = /profile-hook|node:inspector/;

/** What is in native code below this file is measured by the link itself (takeLinkCpuSeconds). */
const NATIVE_LINK = /packages\/bus\/dist\/native-socket/;

/** V8 builds the sampler's loop into it. */
const SAMPLING_FUNCTION = '#sample';

export interface ThreadProfile {
  readonly profile: Profiler.Profile;
  /** CPU time of the thread while it was counted. */
  readonly cpuMs: number;
  /** Of that, in native code of links; undefined without them. */
  readonly linkCpuMs: number | undefined;
}

function ownCauseOf(url: string, functionName: string): Cause | 'idle' | undefined {
  if (url === '') return undefined;
  if (PROFILER.test(url)) return 'idle';
  if (functionName === SAMPLING_FUNCTION) return 'sample';
  return BY_URL.find(([pattern]) => pattern.test(url))?.[1] ?? 'other';
}

/** Milliseconds of CPU of a thread by cause. */
export function causesOf({ profile, cpuMs, linkCpuMs }: ThreadProfile): Record<Cause, number> {
  const parents = new Map<number, number>();
  const nodes = new Map(profile.nodes.map((node) => [node.id, node]));
  for (const node of profile.nodes) for (const child of node.children ?? []) parents.set(child, node.id);
  const causes = new Map<number, Cause | 'idle'>();
  const causeOf = (id: number): Cause | 'idle' => {
    const known = causes.get(id);
    if (known !== undefined) return known;
    const { functionName = '', url = '' } = nodes.get(id)?.callFrame ?? {};
    const parent = parents.get(id);
    const caller = parent === undefined ? '' : (nodes.get(parent)?.callFrame.url ?? '');
    const cause =
      functionName === '(idle)' || (url === '' && NATIVE_LINK.test(caller))
        ? 'idle'
        : (ownCauseOf(url, functionName) ??
          (parent === undefined || functionName === '(program)' ? 'native' : causeOf(parent)));
    causes.set(id, cause);
    return cause;
  };
  const result: Record<Cause, number> = {
    machine: 0,
    codec: 0,
    nats: 0,
    schedule: 0,
    dense: 0,
    sample: 0,
    answer: 0,
    other: 0,
    native: 0,
  };
  const { samples = [], timeDeltas = [] } = profile;
  samples.forEach((id, i) => {
    const cause = causeOf(id);
    if (cause !== 'idle') result[cause] += Math.max(0, timeDeltas[i + 1] ?? 0) / 1000;
  });
  const sampledMs = CAUSES.reduce((total, cause) => total + result[cause], 0);
  const scale = sampledMs === 0 ? 0 : (cpuMs - (linkCpuMs ?? 0)) / sampledMs;
  for (const cause of CAUSES) result[cause] *= scale;
  result.nats += linkCpuMs ?? 0;
  return result;
}
