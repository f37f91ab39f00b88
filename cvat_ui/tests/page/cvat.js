// A stand-in for CVAT's client core and its interface for plugins: the API that an annotation action
// uses in CVAT 2.54.
// Differences from CVAT: shapes are interpolated point by point if they have equally many points
// (else the earlier one holds), there are no user filters, and every timer fires 50 times as fast,
// with the requested length recorded in `testPage.events`.

'use strict';

(() => {
    const SPEED = 50;
    const testPage = {
        events: [], // progress texts and pauses, in order
        registrations: [], // names of the actions that were passed to register()
        pendingTimers: 0,
        listRequests: 0, // how often the server was asked for its functions
        listAnswers: 0, // how many of these requests have ended, well or not
        frame: 0, // the frame that the page shows
        shown: [], // the object states that the page shows; the annotations may have changed since
    };
    globalThis.testPage = testPage;

    const realSetTimeout = globalThis.setTimeout;
    globalThis.setTimeout = (callback, delay) => {
        testPage.events.push({ pause: delay });
        testPage.pendingTimers += 1;
        return realSetTimeout(() => {
            testPage.pendingTimers -= 1;
            callback();
        }, delay / SPEED);
    };

    class ServerError extends Error {
        constructor(message, code) {
            super(message);
            this.code = code;
        }
    }

    async function request(path, body) {
        let response;
        try {
            response = await fetch(path, body && { method: 'POST', body: JSON.stringify(body) });
        } catch (error) {
            throw new ServerError(`${error.message}.`, 0);
        }
        if (!response.ok) {
            throw new ServerError(await response.text(), response.status);
        }
        return response.json();
    }

    // -------------------------------------------------------------- annotations

    const COUNTS = {
        polygon: (n) => n >= 6 && n % 2 === 0,
        rectangle: (n) => n === 4,
        ellipse: (n) => n === 4,
        mask: (n) => n >= 5,
    };

    function checkPoints({ type, points }) {
        if (!COUNTS[type](points.length) || !points.every(Number.isFinite)) {
            throw new Error(`${type} of ${points.length} numbers cannot be imported`);
        }
    }

    function interpolate(left, right, frame) {
        if (!right || left.points.length !== right.points.length) {
            return left.points;
        }
        const share = (frame - left.frame) / (right.frame - left.frame);
        return left.points.map((value, i) => value + share * (right.points[i] - value));
    }

    function positionAt(track, frame) {
        const keyframes = track.shapes.toSorted((a, b) => a.frame - b.frame);
        const left = keyframes.findLast((keyframe) => keyframe.frame <= frame);
        const right = keyframes.find((keyframe) => keyframe.frame > frame);
        return left
            ? { ...left, points: interpolate(left, right, frame) } : { ...right, outside: true };
    }

    class Job {
        constructor({ id, taskId, startFrame, stopFrame, size, labels, deletedFrames = [] }) {
            Object.assign(this, { id, taskId, startFrame, stopFrame, size, labels });
            const [first, count] = taskId === undefined
                ? [0, size] : [startFrame, stopFrame - startFrame + 1];
            const deleted = new Set(deletedFrames);
            let nextClientID = 1000;
            let objects = new Map(); // client id: {kind, data, lock, hidden, removed}
            const undoSteps = [];

            const stateAt = ([clientID, { kind, data, lock, hidden }], frame) => {
                const at = kind === 'track' ? positionAt(data, frame) : data;
                return {
                    clientID,
                    objectType: kind,
                    shapeType: at.type,
                    points: [...at.points],
                    rotation: at.rotation ?? 0,
                    frame,
                    outside: Boolean(at.outside),
                    occluded: at.occluded,
                    keyframe: kind === 'shape'
                        || data.shapes.some((keyframe) => keyframe.frame === frame),
                    hidden: Boolean(hidden),
                    lock: Boolean(lock),
                    zOrder: at.z_order,
                    source: data.source,
                    attributes: {},
                    group: { id: data.group },
                    label: labels.find((label) => label.id === data.label_id),
                    export: async () => structuredClone({ ...data, clientID }),
                };
            };
            const add = (kind, data) => {
                if (data.clientID !== undefined || data.id !== undefined) {
                    throw new Error('a created object must not have an id or clientID');
                }
                (data.shapes ?? [data]).forEach(checkPoints);
                nextClientID += 1;
                objects.set(nextClientID, { kind, data: structuredClone(data) });
                return nextClientID;
            };
            const exported = (kind) => [...objects]
                .filter(([, object]) => object.kind === kind && !object.removed)
                .map(([clientID, { data }]) => structuredClone({ ...data, clientID }));

            this.frames = {
                frameNumbers: async () => Array.from({ length: count }, (_, i) => first + i),
                get: async (number) => ({
                    number, width: 320, height: 180, deleted: deleted.has(number),
                }),
            };
            this.annotations = {
                get: async (frame, allTracks, filters) => {
                    if (typeof allTracks !== 'boolean' || !Array.isArray(filters)) {
                        throw new Error('annotations.get(frame, allTracks, filters)');
                    }
                    return deleted.has(frame) ? [] : [...objects]
                        .filter(([, { kind, data, removed }]) => !removed
                            && (kind === 'track' || data.frame === frame))
                        .map((entry) => stateAt(entry, frame))
                        .filter((state) => !state.outside || state.keyframe);
                },
                export: async () => ({
                    shapes: exported('shape'), tracks: exported('track'), tags: [],
                }),
                commit: async (created, { shapes, tracks, tags }) => {
                    const removed = [...shapes, ...tracks, ...tags].map(({ clientID }) => {
                        const object = objects.get(clientID);
                        if (!object) {
                            throw new Error('a deleted object was not found');
                        }
                        return object;
                    });
                    // As in CVAT: if an object cannot be added, those added before it stay.
                    const added = [
                        ...created.shapes.map((data) => add('shape', data)),
                        ...created.tracks.map((data) => add('track', data)),
                    ];
                    if (!added.length && !removed.length) {
                        return;
                    }
                    removed.forEach((object) => { object.removed = true; });
                    undoSteps.push(() => {
                        removed.forEach((object) => { object.removed = false; });
                        added.forEach((clientID) => { objects.get(clientID).removed = true; });
                    });
                },
            };
            this.load = ({ shapes = [], tracks = [] }) => {
                objects = new Map();
                for (const [kind, list] of [['shape', shapes], ['track', tracks]]) {
                    for (const { clientID, lock, hidden, ...data } of list) {
                        objects.set(clientID, { kind, data, lock, hidden });
                    }
                }
            };
            // Correct a shape, or a track by a keyframe, as a person does.
            this.correct = (clientID, frame, points) => {
                const { kind, data } = objects.get(clientID);
                data.source = 'manual';
                if (kind === 'shape') {
                    data.points = points;
                } else {
                    const keyframe = { ...positionAt(data, frame), frame, points };
                    data.shapes = [
                        ...data.shapes.filter((other) => other.frame !== frame), keyframe,
                    ];
                }
            };
            this.undo = () => undoSteps.pop()();
            this.undoSteps = undoSteps;
        }
    }

    // -------------------------------------------------------------- actions

    class BaseAction {}
    class BaseCollectionAction extends BaseAction {}
    const registered = [];

    function prepare(declared, given) {
        return Object.fromEntries(Object.entries(declared).map(([name, { type, defaultValue }]) => {
            const value = name in given ? given[name] : defaultValue;
            return [name, type === 'number' ? Number(value) : value];
        }));
    }

    async function perform(job, action, parameters, frame, collection, onProgress, cancelled) {
        const report = (text, percent) => {
            testPage.events.push({ text, percent });
            onProgress(text, percent);
        };
        try {
            await action.init(job, prepare(action.parameters, parameters));
            const { deleted, ...frameData } = await job.frames.get(frame);
            const chosen = action.applyFilter({ collection, frameData: { ...frameData, deleted } });
            const result = await action.run({
                collection: chosen, frameData, onProgress: report, cancelled,
            });
            await job.annotations.commit(result.created, result.deleted, frame);
        } finally {
            await action.destroy();
        }
    }

    const core = {
        classes: { BaseCollectionAction },
        actions: {
            list: async () => [...registered],
            register: async (action) => {
                testPage.registrations.push(action.name);
                if (!(action instanceof BaseAction)) {
                    throw new Error('Provided action must inherit one of base classes');
                }
                if (registered.some(({ name }) => name === action.name)) {
                    throw new Error(`Action name must be unique. "${action.name}" already exists`);
                }
                registered.push(action);
            },
            unregister: async (action) => {
                const i = registered.indexOf(action);
                if (i < 0) {
                    throw new Error('no such action');
                }
                registered.splice(i, 1);
            },
            run: async (job, action, parameters, frame, onProgress, cancelled) => perform(
                job, action, parameters, frame, await job.annotations.export(),
                onProgress, cancelled,
            ),
            call: async (job, action, parameters, frame, states, onProgress, cancelled) => {
                const collection = { shapes: [], tracks: [], tags: [] };
                for (const state of states) {
                    collection[`${state.objectType}s`].push(await state.export());
                }
                await perform(job, action, parameters, frame, collection, onProgress, cancelled);
            },
        },
        lambda: {
            list: async () => {
                testPage.listRequests += 1;
                try {
                    return { models: await request('/api/lambda/functions') };
                } finally {
                    testPage.listAnswers += 1;
                }
            },
            call: async (taskId, model, body) => request(
                `/api/lambda/functions/${model.id}`, { ...body, task: taskId },
            ),
        },
    };

    // -------------------------------------------------------------- the page

    async function showFrame(frame) {
        testPage.frame = frame;
        testPage.shown = await testPage.job.annotations.get(frame, false, []);
    }

    const changeFrameAsync = (frame, fillBuffer, frameStep, forceUpdate) => async () => {
        if (frame !== testPage.frame || forceUpdate) {
            testPage.events.push({ changeFrame: frame });
            await showFrame(frame);
        }
    };
    globalThis.cvatUI = Object.freeze({
        registerComponent: (build) => {
            const { name, destructor } = build({
                dispatch: (thunk) => thunk(),
                actionCreators: { changeFrameAsync },
                store: {
                    getState: () => ({
                        annotation: {
                            job: { instance: testPage.job },
                            player: { frame: { number: testPage.frame } },
                        },
                    }),
                },
            });
            if (typeof name !== 'string' || typeof destructor !== 'function') {
                throw new Error('a plugin has a name and a destructor');
            }
        },
    });

    // -------------------------------------------------------------- for the tests

    const withoutClientID = ({ clientID, ...rest }) => rest;

    Object.assign(testPage, {
        openJob: (job, collection) => {
            testPage.job = new Job(job);
            testPage.job.load(collection);
            testPage.events.length = 0;
        },
        actionNames: () => registered.map(({ name }) => name),
        find: (name) => registered.find((action) => action.name === name),
        /**
         * Run the action as the window does.
         * @returns the message of the error that the annotator would read, or null
         */
        run: async ({ name, frame, parameters, clientID, cancelAfter }) => {
            const action = testPage.find(name);
            const cancelled = () => cancelAfter !== undefined && testPage.events.some(
                ({ text }) => text?.startsWith(cancelAfter),
            );
            await showFrame(frame);
            const states = testPage.shown.filter((state) => state.clientID === clientID);
            const go = clientID === undefined
                ? core.actions.run(testPage.job, action, parameters, frame, () => {}, cancelled)
                : core.actions.call(
                    testPage.job, action, parameters, frame, states, () => {}, cancelled,
                );
            // CVAT's window shows the new objects unless the run was cancelled.
            return go.then(() => (cancelled() ? undefined : showFrame(frame)))
                .then(() => null, (error) => error.message);
        },
        isApplicable: async (name, frame) => {
            const states = await testPage.job.annotations.get(frame, true, []);
            const action = testPage.find(name);
            return Object.fromEntries(states.map(
                (state) => [state.clientID, action.isApplicableForObject(state)],
            ));
        },
        read: async () => testPage.job.annotations.export(),
        content: async () => {
            const { shapes, tracks } = await testPage.job.annotations.export();
            return { shapes: shapes.map(withoutClientID), tracks: tracks.map(withoutClientID) };
        },
    });

    const kind = new URLSearchParams(window.location.search).get('core');
    if (kind === 'old') {
        globalThis.cvat = { classes: {}, lambda: core.lambda };
    } else if (kind === 'late') {
        realSetTimeout(() => { globalThis.cvat = core; }, 200);
    } else if (kind !== 'none') {
        globalThis.cvat = core;
    }
})();
