/**
 * Owns the kinds of fault: what is done to which cluster, how it is made good, and by what it shows that it was noticed.
 * A scenario is one row of the table, and one row of the report.
 */
import type { Child } from '@lamina/cli';
import type { Service } from '@lamina/runtime';
import type { ChaosCluster } from './chaos-cluster.ts';
import type { Cuts } from './clients/client.ts';
import { type ClusterKind, diskOf } from './clusters.ts';
import { inUse } from './in-use.ts';
import { canPartition, IsolatedProcess } from './isolated-process.ts';
import type { Random } from './random.ts';
import { sleep } from './requests.ts';
import type { Sign } from './sign.ts';
import { canMount, emptyDisk, fillDisk } from './small-disk.ts';
import { type Harm, TensorProxy } from './tensor-proxy.ts';

export interface Fault {
  /** Resolves when it would hit something; absent where it always does. Rejects when that is not so in time. */
  ready?(random: Random): Promise<void>;
  /** Makes it, and makes it good. */
  act(random: Random): Promise<void>;
  /** By what the cluster shows that it has noticed; absent where that cannot be seen. */
  readonly sign?: (() => Sign) | undefined;
  /** What is wrong afterwards, besides answers. */
  problems?(): string[];
  /** Removes what was made for it; the cluster goes on. */
  cleanUp?(): Promise<void>;
}

export interface Scenario {
  readonly name: string;
  /** How often it happens in the short form, 0 where that does without it, and in the long one. */
  readonly numFaults: readonly [short: number, long: number];
  /** What it may take from who listens to a stream of replies. */
  readonly cuts: Cuts;
  readonly cluster: ClusterKind;
  readonly isPossible: boolean;
  readonly prepare: (tested: ChaosCluster, random: Random, isLong: boolean) => Fault | Promise<Fault>;
}

const KILLS = [3, 20] as const;
const STALLS = [1, 10] as const;
/** The short form has five minutes. */
const LONG_STALLS = [0, 10] as const;
const STALL_MS = 10_000;
const DISK_FULL_MS = 5_000;
const REFILL_MS = 20;
/** The last part of that time, in which JetStream is asked whether it is there. */
const PROBE_MS = 2_000;
const HARM_RATE = 0.002;
const MAY_PARTITION = canPartition();

/** By what each service's absence shows; nobody says a word about a gateway. */
const SIGNS: Readonly<Partial<Record<Service, (tested: ChaosCluster) => Sign>>> = {
  'attention-shard': (tested) => tested.shardLost(),
  'dense-executor': (tested) => tested.logged('taking a request up'),
  'kv-manager': (tested) => tested.logged('no kv-manager answers'),
};
const SERVICES = ['attention-shard', 'dense-executor', 'kv-manager', 'gateway'] as const satisfies readonly Service[];

const signOf = (tested: ChaosCluster, service: Service): Fault['sign'] => {
  const sign = SIGNS[service];
  return sign === undefined ? undefined : () => sign(tested);
};

/** What is done to one running process of each of these services, once all of those hold work. */
function onVictims(
  services: readonly Service[],
  scenario: { readonly name: string; readonly numFaults: Scenario['numFaults'] },
  harm: (victims: readonly Child[], tested: ChaosCluster, random: Random) => Promise<void>,
): Scenario {
  return onPlain(scenario.name, scenario.numFaults, (tested) => {
    let victims: readonly Child[] = [];
    return {
      ready: async (random) => {
        victims = services.map((service) => tested.victim(service, random));
        await Promise.all(services.map((service, index) => inUse(tested.cluster, service, victims[index]!)));
      },
      sign: signOf(tested, services[0]!),
      act: (random) => harm(victims, tested, random),
    };
  });
}

/** They die, and others start a moment later. */
function killed(services: readonly Service[], name: string, numFaults: Scenario['numFaults']): Scenario {
  const scenario = onVictims(services, { name, numFaults }, async (victims, tested, random) => {
    for (const victim of victims) victim.kill('SIGKILL');
    await sleep(random.between(0, 800));
    await Promise.all(services.map((service) => tested.cluster.add(service)));
  });
  return { ...scenario, cuts: services.includes('gateway') ? 'gateways' : 'nothing' };
}

function stopped(service: Service): Scenario {
  return onVictims([service], { name: `stop ${service}`, numFaults: STALLS }, async ([victim]) => {
    victim!.kill('SIGSTOP');
    await sleep(STALL_MS);
    victim!.kill('SIGCONT');
  });
}

/** One that is on the other side of a link is cut off while it holds work, and found by the others again. */
function cutOff(service: Service, name: string, numFaults: Scenario['numFaults']): Scenario {
  const scenario = onPlain(name, numFaults, async (tested) => {
    const isolated = await IsolatedProcess.start(tested, service);
    return {
      ready: async () => {
        // Again after a cut: what the kv-manager knew is gone then, and what was unsent comes within some seconds.
        await tested.whole();
        await inUse(tested.cluster, service, isolated.child);
      },
      sign:
        service === 'attention-shard'
          ? () => tested.shardLost((shardId) => isolated.isOwnShardId(shardId))
          : signOf(tested, service),
      act: async () => {
        isolated.cut();
        await sleep(STALL_MS);
        isolated.heal();
      },
      cleanUp: () => isolated.stop(),
    };
  });
  return { ...scenario, cuts: service === 'gateway' ? 'gateways' : 'nothing', isPossible: MAY_PARTITION };
}

/** Messages of two of the three shards are harmed on their way. */
function tensors(name: string, harms: readonly Harm[], signOfHarm?: (tested: ChaosCluster) => Sign): Scenario {
  const prepare: Scenario['prepare'] = async (tested, random, isLong) => {
    const proxy = await TensorProxy.start({ serverPort: tested.natsPort, random, harms, rate: HARM_RATE });
    const { cluster } = tested;
    const replaceShards = async (settings: { natsUrl?: string }): Promise<void> => {
      const old = cluster.processes('attention-shard').filter((shard) => shard.isRunning);
      await Promise.all(old.slice(1).map((shard) => shard.stop(5_000)));
      await Promise.all(old.slice(1).map(() => cluster.add('attention-shard', settings)));
    };
    await replaceShards({ natsUrl: proxy.url });
    return {
      sign: signOfHarm && (() => signOfHarm(tested)),
      act: async () => {
        proxy.isHarming = true;
        await sleep(isLong ? 60_000 : 10_000);
        proxy.isHarming = false;
      },
      problems: () => {
        console.log(`harmed: ${JSON.stringify(proxy.numHarmed)}`);
        return harms.filter((harm) => proxy.numHarmed[harm] === 0).map((harm) => `no ${harm}`);
      },
      cleanUp: async () => {
        // The direct one is the first that runs, so these two are the ones behind the proxy.
        await replaceShards({});
        await proxy.stop();
      },
    };
  };
  return { name: `tensors ${name}`, numFaults: [1, 1], cuts: 'nothing', cluster: 'checked', isPossible: true, prepare };
}

function onPlain(name: string, numFaults: Scenario['numFaults'], prepare: Scenario['prepare']): Scenario {
  return { name, numFaults, cuts: 'nothing', cluster: 'plain', isPossible: true, prepare };
}

export const SCENARIOS: readonly Scenario[] = [
  ...SERVICES.map((service) => killed([service], `kill ${service}`, KILLS)),
  {
    ...onPlain('kill nats-server', KILLS, (tested) => ({
      sign: () => tested.disconnected(),
      act: async (random) => {
        await tested.killNats();
        await sleep(random.between(0, 1_500));
        await tested.startNats();
      },
    })),
    cuts: 'replies',
  },
  killed(['kv-manager', 'dense-executor'], 'kill kv-manager and dense-executor', [1, 10]),
  {
    ...onPlain('kill everything', [1, 5], (tested) => ({
      act: async (random) => {
        await tested.killAll();
        await sleep(random.between(0, 500));
        await tested.startAll();
      },
    })),
    cuts: 'gateways',
  },
  onPlain('kill every attention-shard', [1, 5], (tested) => ({
    sign: () => tested.shardLost(),
    act: async (random) => {
      const shards = tested.cluster.processes('attention-shard').filter((shard) => shard.isRunning);
      for (const shard of shards) shard.kill('SIGKILL');
      await sleep(random.between(500, 2_000));
      await Promise.all(shards.map(() => tested.cluster.add('attention-shard')));
    },
  })),
  ...SERVICES.map(stopped),
  cutOff('attention-shard', 'partition of an attention-shard', STALLS),
  cutOff('dense-executor', 'partition of a dense-executor', LONG_STALLS),
  cutOff('kv-manager', 'partition of the kv-manager', LONG_STALLS),
  cutOff('gateway', 'partition of a gateway', LONG_STALLS),
  tensors('delayed, duplicated and reordered', ['delay', 'duplicate', 'reorder']),
  tensors('corrupted', ['corrupt'], (tested) => tested.logged('a tensor frame was damaged on its way')),
  {
    name: 'disk full',
    numFaults: STALLS,
    cuts: 'replies',
    cluster: 'small disk',
    isPossible: canMount(),
    prepare: (tested) => {
      let numUnfelt = 0;
      return {
        act: async () => {
          // Filled again and again: what nats-server deletes meanwhile would be room.
          const probeAtMs = performance.now() + DISK_FULL_MS - PROBE_MS;
          while (performance.now() < probeAtMs) {
            fillDisk(diskOf(tested));
            await sleep(REFILL_MS);
          }
          const [isThere] = await Promise.all([tested.hasJetStream(PROBE_MS), sleep(PROBE_MS)]);
          if (isThere) numUnfelt++;
          emptyDisk(diskOf(tested));
          // nats-server gives JetStream up on a full disk, and takes it on again only when it is started again.
          await tested.killNats();
          await tested.startNats();
        },
        problems: () => (numUnfelt === 0 ? [] : [`JetStream went on on ${numUnfelt} full disks`]),
      };
    },
  },
];
