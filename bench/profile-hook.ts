/**
 * Owns profiling a service from inside: loaded by `--import` into all processes of a cluster, it acts in a
 * dense-executor only. One SIGUSR2 starts the count of every thread's CPU time, the second ends it and starts the CPU profiler of
 * each, the third ends that, and a ThreadProfile each is written into BENCH_PROFILE_DIR.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { Session } from 'node:inspector';
import { join } from 'node:path';
import { BroadcastChannel, isMainThread, threadId } from 'node:worker_threads';
import type { ThreadProfile } from './profile.ts';

const SAMPLING_INTERVAL_US = 500;
const directory = process.env.BENCH_PROFILE_DIR;

if (directory !== undefined && process.argv[1]?.includes('dense-executor') === true) {
  const session = new Session();
  session.connect();
  session.post('Profiler.enable');
  session.post('Profiler.setSamplingInterval', { interval: SAMPLING_INTERVAL_US });
  const { takeLinkCpuSeconds } = await import('@lamina/bus');
  /** The first field is what the thread has run, in ns. */
  const threadCpuMs = (): number => Number(readFileSync('/proc/thread-self/schedstat', 'utf8').split(' ')[0]) / 1e6;
  let startedCpuMs = 0;
  let counted: Omit<ThreadProfile, 'profile'> = { cpuMs: 0, linkCpuMs: undefined };
  const startCount = (): void => {
    startedCpuMs = threadCpuMs();
    takeLinkCpuSeconds(true);
  };
  const startProfiler = (): void => {
    const cpuMs = threadCpuMs() - startedCpuMs;
    const linkCpuSeconds = takeLinkCpuSeconds(false);
    counted = { cpuMs, linkCpuMs: linkCpuSeconds === undefined ? undefined : 1000 * linkCpuSeconds };
    session.post('Profiler.start');
  };
  const write = (number: number): void => {
    session.post('Profiler.stop', (_error, result) => {
      if (result === undefined) return;
      const written: ThreadProfile = { profile: result.profile, ...counted };
      writeFileSync(join(directory, `${number}-${threadId}.json`), JSON.stringify(written));
    });
  };
  const onSignal = (signals: number): void => {
    if (signals % 3 === 1) startCount();
    else if (signals % 3 === 2) startProfiler();
    else write(signals / 3);
  };
  const channel = new BroadcastChannel('profile');
  if (isMainThread) {
    let signals = 0;
    process.on('SIGUSR2', () => {
      signals++;
      channel.postMessage(signals);
      onSignal(signals);
    });
  } else {
    channel.onmessage = ({ data }: { data: unknown }) => onSignal(Number(data));
  }
  channel.unref();
}
