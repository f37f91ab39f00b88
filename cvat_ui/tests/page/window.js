// A plain window in place of CVAT's "Run annotation action": choose, set, run, cancel. It draws
// the frame and what is annotated on it. Only for looking at and for clicking through.

'use strict';

(() => {
    const WIDTH = 520;
    let scale = 1; // of the frame on the canvas
    const COLORS = ['#ffe119', '#1f3bd8', '#e6194b', '#f58231'];
    const { testPage } = globalThis;

    function decodeMask(points) {
        const [x1, y1, x2, y2] = points.slice(-4);
        const width = x2 - x1 + 1;
        const pixels = new Set();
        let at = 0;
        points.slice(0, -4).forEach((run, i) => {
            for (let k = at; i % 2 === 1 && k < at + run; k += 1) {
                pixels.add(k);
            }
            at += run;
        });
        return [...pixels].map((k) => [x1 + (k % width), y1 + Math.floor(k / width), y2]);
    }

    function drawShape(context, { shapeType, points }, color) {
        context.fillStyle = `${color}99`;
        context.strokeStyle = color;
        context.lineWidth = 2;
        context.beginPath();
        if (shapeType === 'mask') {
            decodeMask(points).forEach(([x, y]) => {
                context.fillRect(x * scale, y * scale, scale, scale);
            });
        } else if (shapeType === 'ellipse') {
            const [cx, cy, right, top] = points.map((value) => value * scale);
            context.ellipse(cx, cy, right - cx, cy - top, 0, 0, 2 * Math.PI);
        } else if (shapeType === 'rectangle') {
            const [x1, y1, x2, y2] = points.map((value) => value * scale);
            context.rect(x1, y1, x2 - x1, y2 - y1);
        } else {
            for (let i = 0; i < points.length; i += 2) {
                context.lineTo(points[i] * scale, points[i + 1] * scale);
            }
            context.closePath();
        }
        context.fill();
        context.stroke();
    }

    testPage.show = async (frame) => {
        const image = new Image();
        image.src = `/frames/${String(frame).padStart(5, '0')}.jpg`;
        await image.decode();
        const canvas = document.querySelector('canvas');
        scale = WIDTH / image.width;
        canvas.width = WIDTH;
        canvas.height = image.height * scale;
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0, canvas.width, canvas.height);
        const states = await testPage.job.annotations.get(frame, false, []);
        states.filter(({ outside }) => !outside)
            .forEach((state, i) => drawShape(context, state, COLORS[i % COLORS.length]));
        context.fillStyle = '#000c';
        context.fillRect(0, 0, 92, 26);
        context.fillStyle = '#fff';
        context.font = '15px sans-serif';
        context.fillText(`frame ${frame}`, 10, 18);
    };

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
        dialog.innerHTML = '<h2>Run annotation action</h2><label>Action <select></select></label>'
            + '<div id="parameters"></div><progress max="100" value="0"></progress>'
            + '<div id="message"></div><footer><button id="close">Close</button>'
            + '<button id="run">Run</button></footer>';
        document.body.append(dialog);
        const [select] = dialog.getElementsByTagName('select');
        for (const { name } of await globalThis.cvat.actions.list()) {
            select.append(new Option(name, name));
        }
        const instance = testPage.job;
        const call = (value) => (typeof value === 'function' ? value({ instance }) : value);
        const inputs = new Map();
        for (const [label, one] of Object.entries(testPage.find(select.value).parameters)) {
            const input = createInput(one.type, call(one.values), call(one.defaultValue));
            const line = document.createElement('label');
            line.append(label, input);
            dialog.querySelector('#parameters').append(line);
            inputs.set(label, input);
        }
        let cancelled = false;
        dialog.querySelector('#close').addEventListener('click', () => { cancelled = true; });
        dialog.querySelector('#run').addEventListener('click', async () => {
            const parameters = Object.fromEntries([...inputs].map(([label, input]) => (
                [label, input.type === 'number' ? input.value : String(input.checked)]
            )));
            dialog.querySelector('#close').textContent = 'Cancel';
            await globalThis.cvat.actions.run(
                instance, testPage.find(select.value), parameters, frame, (text, percent) => {
                    dialog.querySelector('#message').textContent = text;
                    dialog.querySelector('progress').value = percent;
                }, () => cancelled,
            ).catch((error) => { dialog.querySelector('#message').textContent = error.message; });
            dialog.dataset.done = 'true';
        });
        dialog.show();
    };
})();
