/**
 * Owns profiling a service from inside: loaded by `--import` into all processes of a cluster, it acts in a
 * dense-executor only. SIGUSR2 starts the CPU profiler of every thread, the next one ends it and writes a ThreadProfile each
 * into BENCH_PROFILE_DIR.
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
  const start = (): void => {
    session.post('Profiler.start');
    startedCpuMs = threadCpuMs();
    takeLinkCpuSeconds(true);
  };
  const stop = (number: number): void => {
    const cpuMs = threadCpuMs() - startedCpuMs;
    const linkCpuSeconds = takeLinkCpuSeconds(false);
    session.post('Profiler.stop', (_error, result) => {
      if (result === undefined) return;
      const linkCpuMs = linkCpuSeconds === undefined ? undefined : 1000 * linkCpuSeconds;
      const written: ThreadProfile = { profile: result.profile, cpuMs, linkCpuMs };
      writeFileSync(join(directory, `${number}-${threadId}.json`), JSON.stringify(written));
    });
  };
  const channel = new BroadcastChannel('profile');
  if (isMainThread) {
    let signals = 0;
    process.on('SIGUSR2', () => {
      signals++;
      channel.postMessage(signals);
      if (signals % 2 === 1) start();
      else stop(signals / 2);
    });
  } else {
    channel.onmessage = ({ data }: { data: unknown }) => {
      const signals = Number(data);
      if (signals % 2 === 1) start();
      else stop(signals / 2);
    };
  }
  channel.unref();
}
