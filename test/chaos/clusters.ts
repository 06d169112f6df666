/**
 * Owns the clusters of a chaos run. Starting one takes longer than most faults, so scenarios that need the same kind share it.
 *
 * Invariants
 * 1. A scenario finds the cluster whole: everything runs, and the kv-manager knows it.
 * 2. What a failed scenario leaves is thrown away.
 * 3. One cluster runs at a time.
 */
import { dirname, join } from 'node:path';
import { ChaosCluster } from './chaos-cluster.ts';
import { mountSmallDisk, unmountSmallDisk } from './small-disk.ts';

/** `checked`: with a checksum over every tensor. `small disk`: JetStream has 96 MiB. */
export type ClusterKind = 'plain' | 'checked' | 'small disk';

export class Clusters {
  #current: { readonly kind: ClusterKind; readonly cluster: ChaosCluster } | undefined;

  /** The running cluster of this kind, or a new one in the place of another kind's. */
  async get(kind: ClusterKind): Promise<ChaosCluster> {
    if (this.#current?.kind !== kind) {
      await this.stop();
      this.#current = { kind, cluster: await startCluster(kind) };
    }
    const { cluster } = this.#current;
    await cluster.whole();
    return cluster;
  }

  logs(): string {
    return this.#current?.cluster.logs() ?? 'no cluster runs';
  }

  async stop(): Promise<void> {
    const { kind, cluster } = this.#current ?? {};
    this.#current = undefined;
    await cluster?.stop();
    if (cluster !== undefined && kind === 'small disk') unmountSmallDisk(diskOf(cluster));
  }
}

/** The directory of the small disk under a cluster of that kind. */
export const diskOf = (cluster: ChaosCluster): string => dirname(cluster.storeDir);

async function startCluster(kind: ClusterKind): Promise<ChaosCluster> {
  if (kind === 'plain') return ChaosCluster.start();
  if (kind === 'checked') return ChaosCluster.start({ settings: { tensorChecksum: 'all' } });
  const directory = mountSmallDisk();
  if (directory === undefined) throw new Error('this process may not mount a disk');
  try {
    return await ChaosCluster.start({ storeDir: join(directory, 'store') });
  } catch (cause) {
    unmountSmallDisk(directory);
    throw cause;
  }
}
