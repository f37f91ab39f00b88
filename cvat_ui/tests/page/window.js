// A plain dialog in place of CVAT's "Run annotation action" window: choose, set, run, cancel.

'use strict';

(() => {
    const { testPage } = globalThis;

    function createInput(type, values, value) {
        const input = document.createElement('input');
        input.type = type;
        if (type === 'number') {
            [input.min, input.max, input.step] = values;
            input.value = value;
        } else {
            input.checked = value === 'true';
        }
        return input;
    }

    testPage.openWindow = async (frame) => {
        const dialog = document.createElement('dialog');
        dialog.innerHTML = '<label>Action <select></select></label><div id="parameters"></div>'
            + '<progress max="100" value="0"></progress><div id="message"></div>'
            + '<button id="close">Close</button><button id="run">Run</button>';
        document.body.append(dialog);
        const [select] = dialog.getElementsByTagName('select');
        for (const { name } of await globalThis.cvat.actions.list()) {
            select.append(new Option(name, name));
        }
        const instance = testPage.job;
        const resolve = (value) => (typeof value === 'function' ? value({ instance }) : value);
        const inputs = new Map();
        const { parameters } = testPage.find(select.value);
        for (const [label, { type, values, defaultValue }] of Object.entries(parameters)) {
            const input = createInput(type, resolve(values), resolve(defaultValue));
            const line = document.createElement('label');
            line.append(label, input);
            dialog.querySelector('#parameters').append(line);
            inputs.set(label, input);
        }
        let cancelled = false;
        dialog.querySelector('#close').addEventListener('click', () => { cancelled = true; });
        dialog.querySelector('#run').addEventListener('click', async () => {
            const given = Object.fromEntries([...inputs].map(([label, input]) => (
                [label, input.type === 'number' ? input.value : String(input.checked)]
            )));
            dialog.querySelector('#close').textContent = 'Cancel';
            await globalThis.cvat.actions.run(
                instance, testPage.find(select.value), given, frame, (text, percent) => {
                    dialog.querySelector('#message').textContent = text;
                    dialog.querySelector('progress').value = percent;
                }, () => cancelled,
            ).catch((error) => { dialog.querySelector('#message').textContent = error.message; });
            dialog.dataset.done = 'true';
        });
        dialog.show();
    };
})();
