/**
 * Owns the life of a command that needs a cluster: start, use, signals, clean-up, exit status.
 *
 * Invariants
 * 1. Whatever happens, the cluster is stopped before the command returns.
 * 2. The first signal stops in order, the second at once. The status is 128 + the signal's number.
 */
import { constants } from 'node:os';
import { asLaminaError } from '@lamina/tensor';
import { type Cluster, type ClusterOptions, startCluster } from './cluster.ts';
import { reportFailure } from './report.ts';

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** Runs `use` on a started cluster and returns the exit status of the command. */
export async function withCluster(
  options: Omit<ClusterOptions, 'signal'>,
  use: (cluster: Cluster, interrupted: Promise<void>) => Promise<number>,
): Promise<number> {
  let cluster: Cluster | undefined;
  let status: number | undefined;
  const abort = new AbortController();
  const interrupted = new Promise<void>((resolve) => abort.signal.addEventListener('abort', () => resolve()));
  const interrupt = (exitStatus: number): void => {
    if (status !== undefined) {
      process.stderr.write('\nending at once\n');
      void cluster?.kill();
      return;
    }
    status = exitStatus;
    abort.abort();
  };
  for (const signal of SIGNALS) process.on(signal, () => interrupt(128 + constants.signals[signal]));
  // A reader that went away (`| head`) is no reason to leave processes behind.
  process.stdout.on('error', () => interrupt(128 + constants.signals.SIGPIPE));
  try {
    cluster = await startCluster({ ...options, signal: abort.signal });
    const failed = cluster.failure.then((error) => Promise.reject(error));
    const used = await Promise.race([use(cluster, interrupted), failed, interrupted.then(() => 0)]);
    return status ?? used;
  } catch (cause) {
    if (status === undefined) reportFailure(asLaminaError(cause));
    return status ?? 1;
  } finally {
    status ??= 0;
    await cluster?.stop();
  }
}
